"""Checkpoints of several ranks: errors reach all of them, and the thread keeps out of the way."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from geon.engine import checkpoint, integrity, writing
from geon.launch import local
from tests.distributed.jobs import launch, train
from tests.reliability.checkpoints_job import same, tensors

pytestmark = pytest.mark.dist


@pytest.mark.row("R12")
def test_what_one_rank_cannot_save_all_ranks_hear_of(tmp_path):
    """R12, R19, R20: the same message on both; nothing half-written stays; saving goes on."""
    program = Path(__file__).parent / "checkpoints_ranks.py"
    done = launch(local.torchrun_command(2, [str(tmp_path / "c")], program), 120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    one, two = found["heard"]
    assert one == two
    assert one[0] == one[3] == "saved"
    assert one[1].startswith("FloatingPointError: step 2: 'a' and 0 more")
    assert "No space left on device" in one[2]
    assert "step-0000001'" in one[2]
    assert found["left"] == ["latest", "step-0000001", "step-0000004"]
    assert found["sound"] == [None, None]
    assert found["cut"] == list(range(10))


@pytest.mark.slow
@pytest.mark.row("R13")
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_two_ranks_save_beside_the_training_what_they_save_within_it(tmp_path, layout):
    """R13: every step a checkpoint, so that threads and steps always meet; then a resume."""
    options = [f"parallel={layout}", "checkpoint.every=1", "checkpoint.keep=4", "schedule.steps=8"]
    now = train(tmp_path, "now", 2, *options)
    later = train(tmp_path, "later", 2, *options, "checkpoint.background=true")
    for path in checkpoint.committed(now / "checkpoints"):
        other = later / "checkpoints" / path.name
        assert same(tensors(path), tensors(other))
        assert integrity.sound(other) is None
    for step in (7, 8):
        shutil.rmtree(later / "checkpoints" / f"step-{step:07d}")
    train(tmp_path, "later", 2, *options, "checkpoint.background=true")
    assert same(tensors(now), tensors(later))


@pytest.mark.slow
@pytest.mark.row("R17")
@pytest.mark.parametrize("optim", ["soap", "sophia", "shampoo"])
def test_baselines_resume_on_two_ranks_with_copies(tmp_path, optim):
    options = [f"optim={optim}", "parallel=ddp", "checkpoint.every=10", "checkpoint.keep=5"]
    run = train(tmp_path, "run", 2, *options)
    whole = tensors(run)
    shutil.rmtree(run / "checkpoints" / "step-0000020")
    train(tmp_path, "run", 2, *options)
    assert same(whole, tensors(run))


@pytest.mark.slow
@pytest.mark.row("R07")
@pytest.mark.parametrize("most", [1, 500, 2000, 10_000, 30_000, 60_000, 90_000, 110_000, 115_000])
def test_a_process_killed_within_a_save_leaves_the_one_before(tmp_path, most):
    """R07, R15: SIGKILL after so many bytes, of about 120,000."""
    program = Path(__file__).parent / "checkpoints_killed.py"
    done = launch([sys.executable, str(program), str(tmp_path), str(most)], 100)
    assert done.returncode == -9, done.stderr[-2000:]
    assert len(writing.recover(tmp_path)) == 1
    choice = checkpoint.newest_sound(tmp_path, fall_back=True)
    assert (choice.path.name, choice.said) == ("step-0000001", [])
    assert not [p for p in tmp_path.iterdir() if p.suffix]
