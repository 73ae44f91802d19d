"""Runs of other packages' optimizers go on as if they had not stopped."""

import json
import shutil

import pytest

from geon.engine import checkpoint, integrity, kept
from geon.errors import UsageError
from tests.reliability.checkpoints_job import run, same, tensors

BASELINES = (
    "adafactor adagrad adam lamb lars lion momentum nesterov rmsprop sgd shampoo soap sophia"
)
FAST = ("shampoo", "soap")


@pytest.mark.row("R17")
@pytest.mark.parametrize(
    "optim",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BASELINES.split()],
)
def test_a_resumed_baseline_ends_as_the_uninterrupted_one(tmp_path, optim):
    """R17: weights, and all that the optimizer keeps, to the last bit."""
    options = [f"optim={optim}", "schedule.steps=24", "checkpoint.every=13", "checkpoint.keep=5"]
    folder = run(tmp_path, *options)
    whole, facts = tensors(folder), checkpoint.read_commit(checkpoint.find(folder))
    shutil.rmtree(folder / "checkpoints" / "step-0000024")
    run(tmp_path, *options)
    assert same(whole, tensors(folder))
    again = checkpoint.read_commit(checkpoint.find(folder))
    assert again["state"] == facts["state"]
    assert facts["state"]["groups"]


@pytest.mark.row("R17")
def test_without_its_count_a_baseline_ends_elsewhere(tmp_path, monkeypatch):
    """R17: the control, that the numbers matter."""
    options = ["optim=soap", "schedule.steps=12", "checkpoint.every=6", "checkpoint.keep=5"]
    folder = run(tmp_path, *options)
    whole = tensors(folder)
    shutil.rmtree(folder / "checkpoints" / "step-0000012")
    real = kept.restore

    def forget(optimizer, saved, make):
        real(optimizer, saved | {"groups": {k: {"dict": {}} for k in saved["groups"]}}, make)

    monkeypatch.setattr(kept, "restore", forget)
    run(tmp_path, *options)
    assert not same(whole, tensors(folder))


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    folder = run(tmp_path, "optim=lion", "schedule.steps=2")
    told = "schedule.steps=4", "checkpoint.allow_change=[optim]"
    with pytest.raises(UsageError, match="for baseline 'shampoo' but for 'lion'"):
        run(tmp_path, "optim=shampoo", *told)
    with pytest.raises(UsageError, match="lacks .* written with another optim group"):
        run(tmp_path, "optim=adamw", *told)
    (folder / "checkpoints" / "step-0000002" / "x").touch()
    with pytest.raises(UsageError, match="none can be used"):
        run(tmp_path, "optim=lion", "schedule.steps=4")


def test_what_cannot_be_held_is_refused_by_name():
    with pytest.raises(UsageError, match="cannot hold 'w.inner.0' of the optimizer's state, a set"):
        kept._split({"inner": [{1, 2}]}, "w", None, {})


def test_garbled_descriptions_are_one_message(tmp_path):
    folder = run(tmp_path, "optim=lion", "schedule.steps=2")
    path = checkpoint.find(folder)
    facts = json.loads((path / "commit.json").read_text())
    facts.pop("sha256")
    first = next(iter(facts["state"]["states"]))
    deep = {"dict": {"a": {"tensor": 1, "x": 2}}}
    for described in (3, {}, {"dict": 3}, deep, {"object": "str", "fields": {}}):
        facts["state"]["states"][first] = described
        (path / "commit.json").write_text(integrity.sealed(facts))
        with pytest.raises(UsageError):
            run(tmp_path, "optim=lion", "schedule.steps=4")
