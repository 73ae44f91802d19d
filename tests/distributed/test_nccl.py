"""Exchanges over NCCL, several ranks on one GPU where NCCL allows that; the same on gloo here."""

import pytest

from tests.distributed.jobs import by_rank, needs_gpu_ranks

pytestmark = pytest.mark.dist


def check(ranks, device, steps, load_steps):
    options = (device, str(steps), str(load_steps))
    found = by_rank(ranks, "nccl_job.py", options, timeout=400)
    for index, (rule, layout, transport, wire, error, _) in enumerate(found[0]["rows"]):
        case = f"{rule} {layout} {transport} {wire}"
        # Owners differ by the sums of AdamW's clipping norm and of row norms alone.
        exact = 1e-6 if transport == "owner" else 1e-5
        assert error <= (exact if wire == "fp32" else 2e-3), case
        assert all(rank["rows"][index][4:] == [error, True] for rank in found), case
    for rank, one in enumerate(found):
        where = "'square' and 0 more" if rank == 1 else "on another rank"
        assert f"{where} is not finite: nothing was stepped" in one["nan"]
        for rule, (from_quiet, from_one) in one["under_load"].items():
            # The same operations on the same numbers: on a CPU in the same order, too.
            assert from_quiet <= (1e-6 if device == "cuda" else 0.0), rule
            assert from_one <= 1e-5, rule


@pytest.mark.gpu
@needs_gpu_ranks(4)
def test_four_ranks_give_the_weights_of_one_process():
    check(4, "cuda", 6, 200)


@pytest.mark.slow
def test_two_ranks_of_a_cpu_do_the_same():
    check(2, "cpu", 3, 20)
