"""Exchanges over NCCL, with several ranks on one GPU where NCCL allows that."""

import os

import pytest
import torch

from tests.distributed.jobs import by_rank

pytestmark = [
    pytest.mark.dist,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1",
        reason="needs a CUDA device, NCCL >= 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1",
    ),
]


def test_four_ranks_give_the_weights_of_one_process():
    found = by_rank(4, "nccl_job.py", (), timeout=400)
    for index, (rule, layout, transport, wire, error, _) in enumerate(found[0]["rows"]):
        case = f"{rule} {layout} {transport} {wire}"
        # Owners differ by the sums of AdamW's clipping norm and of row norms alone.
        exact = 1e-6 if transport == "owner" else 1e-5
        assert error <= (exact if wire == "fp32" else 2e-3), case
        assert all(rank["rows"][index][4:] == [error, True] for rank in found), case
    for rank, one in enumerate(found):
        where = "'square' and 0 more" if rank == 1 else "on another rank"
        assert f"{where} is not finite: nothing was stepped" in one["nan"]
        assert one["under_load"] <= 1e-6
