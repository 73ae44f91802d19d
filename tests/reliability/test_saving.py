"""Saving: whole or absent, beside the training or within it, and what happens when it fails."""

import os
import re
import resource
import shutil
import signal
import threading

import pytest
import torch

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine import checkpoint, checkpointer, integrity, writing
from geon.engine.parallel import Parallel
from geon.engine.writing import Peers, save
from geon.errors import SaveError, UsageError
from geon.launch.env import Env
from tests.reliability.checkpoints_job import run, same, tensors

FACTS = {"model": {"arch": "gpt"}}
KEPT = ["optim=muon", "schedule.steps=6", "checkpoint.every=2", "checkpoint.keep=2"]


def peers():
    return Peers(Parallel(ParallelConfig(layout=Layouts.single), Env(), torch.device("cpu")))


def put(root, step, keep=2, value=None, size=1000):
    """Save a checkpoint of one tensor, of which every entry is the step."""
    content = {
        "a": torch.full((size,), float(step if value is None else value)),
        "b": torch.ones(3),
    }
    return save(root, step, content, FACTS, keep, peers())


def names(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir())


def value(path):
    return float(tensors(path)["a"][0])


@pytest.mark.row("R13")
def test_in_the_background_the_same_is_saved(tmp_path):
    """R13: every checkpoint, tensor by tensor and fact by fact, but for the clock."""
    now = run(tmp_path, *KEPT, name="now") / "checkpoints"
    later = run(tmp_path, *KEPT, "checkpoint.background=true", name="later") / "checkpoints"
    assert names(now) == names(later) == ["step-0000004", "step-0000006"]
    for name in names(now):
        assert same(tensors(now / name), tensors(later / name))
        assert integrity.sound(later / name) is None
        a, b = checkpoint.read_commit(now / name), checkpoint.read_commit(later / name)
        unlike = ("elapsed", "sha256", "files", "run", "settings")
        assert {k: a[k] for k in a if k not in unlike} == {k: b[k] for k in b if k not in unlike}


@pytest.mark.row("R13")
def test_an_error_of_the_thread_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    """R13: steps go on while the thread writes; the step after its error raises it."""
    reached, release, real = [], threading.Event(), writing.save

    def broken(root, step, *others):
        if step == 4:
            release.wait(30)
            raise SaveError("the disk is on fire")
        return real(root, step, *others)

    class Watch(checkpointer.Checkpointer):
        def on_step(self, trainer):
            reached.append(trainer.step)
            if trainer.step == 7:
                release.set()
                pending = self._pending
                with pytest.raises(SaveError):
                    pending.result(30)
            super().on_step(trainer)

    monkeypatch.setattr(writing, "save", broken)
    monkeypatch.setattr("geon.engine.main.Checkpointer", Watch)
    with pytest.raises(SaveError, match="on fire"):
        run(tmp_path, "optim=adamw", "schedule.steps=20", "checkpoint.every=4", BACKGROUND)
    assert reached == list(range(1, 8))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


BACKGROUND = "checkpoint.background=true"


@pytest.mark.row("R13")
def test_what_is_handed_over_is_a_copy():
    """R13: the training moves on; buffers are used again."""
    staging = checkpointer.Staging()
    weight = torch.arange(4.0)
    first = staging.copy({"w": weight})["w"]
    weight.zero_()
    assert first.tolist() == [0, 1, 2, 3]
    assert staging.copy({"w": weight})["w"].data_ptr() == first.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_a_gpu_are_pinned_and_whole():
    weight = torch.randn(1000, 1000, device="cuda")
    kept, staging = weight.cpu(), checkpointer.Staging()
    copy = staging.copy({"w": weight})["w"]
    weight.zero_()
    assert copy.is_pinned()
    assert torch.equal(copy, kept)


@pytest.mark.row("R12")
@pytest.mark.parametrize("background", ["false", "true"])
def test_nan_is_never_saved_over_good_ones(tmp_path, background, monkeypatch):
    """R12: a bad last update; its tensor is named, and so is the checkpoint that is there."""
    real, step = torch.optim.Optimizer.zero_grad, []

    def poisoned(self, set_to_none=True):
        real(self, set_to_none)
        step.append(1)
        if len(step) == 6:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")

    monkeypatch.setattr("geon.optim.HybridOptimizer.zero_grad", poisoned)
    options = [*KEPT, "logger.every=50", f"checkpoint.background={background}"]
    with pytest.raises(FloatingPointError) as caught:
        run(tmp_path, *options)
    root = tmp_path / "run" / "checkpoints"
    assert re.search(
        r"step 6: 'model\.[\w.]+' and 0 more tensors are not finite", str(caught.value)
    )
    assert f"The last checkpoint is '{root / 'step-0000004'}'" in str(caught.value)
    assert names(root) == ["step-0000002", "step-0000004"]
    assert all(t.isfinite().all() for t in tensors(root / "step-0000004").values())


def test_nothing_is_promised_where_nothing_is(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        put(tmp_path / "c", 1, value=float("inf"))
    assert "'a' and 0 more tensors are not finite" in str(caught.value)
    assert "last checkpoint" not in str(caught.value)
    assert not (tmp_path / "c").exists()


def test_large_finite_numbers_are_finite():
    held = {"a": torch.full((100,), 3e38), "b": torch.tensor([1, 2]), "c": torch.empty(0)}
    assert writing.nonfinite(held) == []
    assert writing.nonfinite(held | {"d": torch.tensor([1.0, float("nan")])}) == ["d"]


@pytest.mark.row("R12")
def test_retention_goes_by_the_order_of_commits_and_counts_what_is_sound(tmp_path):
    """R12: after a rewind smaller steps are newer; broken folders, links and others stay."""
    for step in (10, 20, 30):
        put(tmp_path, step, keep=3)
    (tmp_path / "step-0000030" / "commit.json").unlink()
    shutil.copytree(tmp_path / "step-0000020", tmp_path / "outside")
    (tmp_path / "step-0000099").symlink_to(tmp_path / "outside")
    (tmp_path / "step-7").mkdir()
    put(tmp_path, 15, keep=2)
    assert names(tmp_path) == [
        *("outside", "step-0000015", "step-0000020", "step-0000030", "step-0000099", "step-7")
    ]
    put(tmp_path, 16, keep=2)
    assert [p.name for p in checkpoint.committed(tmp_path)] == ["step-0000015", "step-0000016"]
    assert checkpoint.newest_sound(tmp_path, fall_back=True).path.name == "step-0000016"
    assert (tmp_path / "outside" / "commit.json").is_file()
    assert (tmp_path / "latest").read_text() == "step-0000016"


@pytest.mark.row("R12")
def test_failed_saves_drop_nothing(tmp_path, monkeypatch):
    """R12: five failures in a row; the last durable ones are still there."""
    put(tmp_path, 1)
    put(tmp_path, 2)
    monkeypatch.setattr(writing, "_commit", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    for step in range(3, 8):
        with pytest.raises(SaveError, match=f"step {step} was not saved.*broken"):
            put(tmp_path, step, keep=1)
    assert names(tmp_path) == ["step-0000001", "step-0000002"]


class Dies(BaseException):
    """Stands for SIGKILL: nothing tidies up after it."""


POINTS = ("before the commit file", "before the renames", "between the renames", "after them")


@pytest.mark.row("R08")
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_dying_in_a_save_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, point, there):
    """R07, R08: of the same step; a complete one is recovered and never mixed with the other."""
    put(tmp_path, 1)
    if there:
        put(tmp_path, 2, value=7.0)

    def die(*_):
        raise Dies

    real = writing.sync_folder
    if point == "before the commit file":
        monkeypatch.setattr(writing, "write_synced", die)
    elif point == "before the renames":
        monkeypatch.setattr(writing, "_put", die)
    elif point == "between the renames":
        rename = type(tmp_path).rename

        def broken(self, target):
            if self.name.endswith("writing"):
                raise Dies
            return rename(self, target)

        monkeypatch.setattr(type(tmp_path), "rename", broken)
    else:
        monkeypatch.setattr(writing, "sync_folder", lambda p: die() if p == tmp_path else real(p))
    with pytest.raises(Dies):
        put(tmp_path, 2, value=9.0)
    monkeypatch.undo()
    said = writing.recover(tmp_path)
    assert said or point == "after them"
    assert not [p for p in tmp_path.iterdir() if p.suffix]
    chosen = checkpoint.newest_sound(tmp_path, fall_back=True)
    assert not chosen.said
    if point == "before the commit file":
        assert value(chosen.path) == (7.0 if there else 1.0)
    else:
        assert (chosen.path.name, value(chosen.path)) == ("step-0000002", 9.0)


def test_a_replaced_one_whose_replacement_is_lost_comes_back(tmp_path):
    put(tmp_path, 2)
    (tmp_path / "step-0000002").rename(tmp_path / "step-0000002.old")
    (tmp_path / "step-0000002.writing").mkdir()
    assert len(writing.recover(tmp_path)) == 2
    assert names(tmp_path) == ["step-0000002"]


@pytest.mark.row("R19")
@pytest.mark.parametrize("limit", [0, 1000, 4096, 20_000, 39_000])
def test_a_full_disk_is_one_message_and_older_ones_are_intact(tmp_path, limit):
    """R19: a limit on the size of files stands for the disk; at five places."""
    put(tmp_path, 1, size=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(SaveError) as caught:
            put(tmp_path, 2, size=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in str(caught.value)
    assert "bytes, " in str(caught.value)
    assert "were free" in str(caught.value)
    assert f"The last checkpoint is '{tmp_path / 'step-0000001'}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-0000001"]
    assert integrity.sound(tmp_path / "step-0000001") is None


@pytest.mark.row("R19")
def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    """R19."""
    found = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: found)
    with pytest.raises(SaveError, match=r"too little room. It needs [\d,]+ bytes, 5,000 were free"):
        put(tmp_path, 2, size=10_000)
    assert names(tmp_path) == []


def test_a_save_of_this_step_that_fails_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    put(tmp_path, 1, value=5.0)
    monkeypatch.setattr(writing, "sealed", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(SaveError, match="full"):
        put(tmp_path, 1, value=6.0)
    assert value(tmp_path / "step-0000001") == 5.0


def test_whatever_the_umask_what_is_saved_can_be_used(tmp_path):
    before = os.umask(0)
    try:
        path = put(tmp_path, 1)
    finally:
        os.umask(before)
    assert integrity.sound(path) is None


def test_a_run_from_another_folder_saves_its_end_in_its_own(tmp_path):
    first = run(tmp_path, *KEPT)
    second = run(tmp_path, *KEPT, f"checkpoint.resume={first}", name="second")
    assert same(tensors(first), tensors(second))
    with pytest.raises(UsageError, match="holds no committed checkpoint"):
        run(tmp_path, *KEPT, f"checkpoint.resume={tmp_path / 'none'}", name="third")
