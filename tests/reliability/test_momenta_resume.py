"""Runs whose momenta rest in bf16 go on as if they had not stopped."""

import shutil

import pytest
import torch

from geon.errors import UsageError
from geon.optim import step
from geon.optim.rounding import round_by_chance
from tests.distributed.jobs import metrics
from tests.reliability.checkpoints_job import run, same, tensors

HALF = ["optim=muon", "schedule.steps=12", "checkpoint.every=6", "checkpoint.keep=5"]
BF16 = [*HALF, "optim.momentum_dtype=bf16"]


def counts(folder):
    """How often momenta were rounded: what their counts are beyond the names' own starts."""
    return {v.item() % 2**31 for k, v in tensors(folder).items() if k.endswith(".draws")}


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch):
    """To the last bit, and not if chance begins anew: the control."""
    folder = run(tmp_path, *BF16)
    whole = tensors(folder)
    assert counts(folder) == {12}
    assert any(v.dtype is torch.bfloat16 for v in whole.values())
    assert 2 < metrics(folder, "train")[-1]["state_bytes_per_parameter"] < 8
    shutil.rmtree(folder / "checkpoints" / "step-0000012")
    shutil.copytree(folder, tmp_path / "other" / folder.name)
    run(tmp_path, *BF16)
    assert same(whole, tensors(folder))

    def anew(boxes):
        round_by_chance([box._replace(draws=torch.zeros_like(box.draws)) for box in boxes])

    monkeypatch.setattr(step, "round_by_chance", anew)
    run(tmp_path / "other", *BF16)
    assert not same(whole, tensors(tmp_path / "other" / folder.name))


def test_a_run_of_fp32_momenta_may_go_on_in_bf16_and_back(tmp_path):
    folder = run(tmp_path, *HALF)
    more = ["schedule.steps=15"]
    with pytest.raises(UsageError, match=r"optim.momentum_dtype is fp32 .* and bf16 here"):
        run(tmp_path, *BF16, *more)
    allowed = "checkpoint.allow_change=[optim.momentum_dtype]"
    run(tmp_path, *BF16, *more, allowed)
    assert counts(folder) == {3}
    run(tmp_path, *HALF, "schedule.steps=18", allowed)
    assert not counts(folder)
