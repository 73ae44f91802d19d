"""Checkpoints that were changed, cut, mixed up or lost: refused by name, and an older one taken."""

import json
import os
import random
import shutil

import pytest

from geon.engine import checkpoint, integrity
from geon.errors import UsageError
from tests.reliability.checkpoints_job import run, same, tensors

OPTIONS = ["optim=muon", "schedule.steps=6", "checkpoint.every=2", "checkpoint.keep=3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with checkpoints of steps 2, 4 and 6."""
    return run(tmp_path_factory.mktemp("made"), *OPTIONS) / "checkpoints"


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run" / "checkpoints")


def reseal(path, **changes):
    """Change a commit file as one would who knows how its digest is made."""
    facts = json.loads((path / "commit.json").read_text())
    facts.pop("sha256")
    (path / "commit.json").write_text(integrity.sealed(facts | changes))


def newest(root):
    return root / "step-0000006"


def damage(file, rng):
    """Flip a bit, cut, empty or remove a file; returns whether its bytes changed."""
    before, kind = file.read_bytes(), rng.choice(["flip", "flip", "flip", "cut", "gone", "longer"])
    if kind == "gone":
        file.unlink()
        return True
    after = bytearray(before)
    if kind == "flip":
        after[rng.randrange(len(after))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del after[rng.choice([0, 1, len(after) // 2, len(after) - 1]) :]
    else:
        after += b"\0"
    file.write_bytes(after)
    return bytes(after) != before


@pytest.mark.row("R09")
@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_no_damage_is_loaded_and_each_refusal_names_the_file(made, tmp_path, count):
    """R09, R10: an older one is taken; whatever loads all the same is the same to the last bit."""
    rng, refused = random.Random(count), 0
    truth = {p.name: (tensors(p), checkpoint.read_commit(p)) for p in made.glob("step-*")}
    for trial in range(count):
        root = shutil.copytree(made, tmp_path / str(trial) / "checkpoints")
        files = sorted(newest(root).iterdir())
        file = files[trial % len(files)]
        damage(file, rng)
        choice = checkpoint.newest_sound(root.parent, fall_back=True)
        if choice.path.name == "step-0000006":  # white space of commit.json, say
            held, facts = truth[choice.path.name]
            assert choice.facts == facts
            assert file.name == "commit.json"
            assert same(tensors(choice.path), held)
        else:
            refused += 1
            assert choice.path.name == "step-0000004"
            assert file.name in choice.said[0]
            with pytest.raises(UsageError, match=file.name):
                checkpoint.newest_sound(newest(root), fall_back=False)
        shutil.rmtree(root.parent)
    assert refused > 0.9 * count


def swap(root):
    a, b = newest(root) / "__0_0_0.distcp", newest(root) / "__0_1_0.distcp"
    aside = a.rename(root / "aside")
    b.rename(a)
    aside.rename(b)


def other_step(root):
    name = "__0_0_0.distcp"
    shutil.copy(root / "step-0000004" / name, newest(root) / name)


def link_folder(root):
    newest(root).rename(root.parent / "elsewhere")
    newest(root).symlink_to(root.parent / "elsewhere")


def link_file(root):
    file = newest(root) / "__0_0_0.distcp"
    file.rename(root / "aside")
    file.symlink_to(root / "aside")


def rename_step(root):
    shutil.rmtree(newest(root))
    shutil.copytree(root / "step-0000004", newest(root))


KINDS = {
    "swapped shards": (swap, "'__0_0_0.distcp' was changed"),
    "a file of another step": (other_step, "'__0_0_0.distcp' was changed"),
    "another step's folder": (rename_step, "is of step 4, the folder is step-0000006"),
    "a link for a folder": (link_folder, "the folder is a link"),
    "a link for a file": (link_file, "'__0_0_0.distcp' is a link"),
    "an extra file": (lambda r: (newest(r) / "x.pt").touch(), "'x.pt' is not of this checkpoint"),
    "a pipe": (lambda r: os.mkfifo(newest(r) / "p"), "'p' is not of this checkpoint"),
    "a list": (lambda r: (newest(r) / "commit.json").write_text("[]"), "commit.json holds no"),
    "depth": (lambda r: (newest(r) / "commit.json").write_text("[" * 10**5), "cannot be read"),
    "bytes": (lambda r: (newest(r) / "commit.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "no model": (lambda r: reseal(newest(r), model=None), "model is None"),
    "step -5": (lambda r: reseal(newest(r), step=-5), "step is -5"),
    "step x": (lambda r: reseal(newest(r), step="x"), "step is 'x'"),
    "step 1e9": (lambda r: reseal(newest(r), step=1e9), "step is 1000000000.0"),
    "step true": (lambda r: reseal(newest(r), step=True), "step is True"),
    "a billion": (lambda r: reseal(newest(r), step=10**9), "is of step 1000000000"),
    "a path": (lambda r: reseal(newest(r), files={".metadata": {}, "../x": {}}), "gives no size"),
    "no files": (lambda r: reseal(newest(r), files={}), "lists no .metadata"),
    "no commit file": (lambda r: (newest(r) / "commit.json").unlink(), "commit.json is missing"),
    "everyone's": (lambda r: (newest(r) / ".metadata").chmod(0o666), "written by everyone"),
    "everyone's folder": (lambda r: newest(r).chmod(0o777), "written by everyone"),
}


@pytest.mark.row("R10")
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_up_and_garbled_checkpoints_are_refused(root, kind):
    """R10, R29: the reason is said; under auto the one before is taken, a named one never."""
    act, words = KINDS[kind]
    act(root)
    reason = integrity.sound(newest(root))
    assert words in reason, reason
    choice = checkpoint.newest_sound(root.parent, fall_back=True)
    assert choice.path.name == "step-0000004"
    assert len(choice.said) == 1
    assert words in choice.said[0]
    for named in (root.parent, newest(root)):
        with pytest.raises(UsageError) as caught:
            checkpoint.newest_sound(named, fall_back=False)
        assert words in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_checkpoint_of_another_user_is_refused(root):
    """R29."""
    os.chown(newest(root), 12345, 12345)
    assert "belongs to user 12345" in integrity.sound(newest(root))


@pytest.mark.row("R11")
@pytest.mark.parametrize("how", ["commit files gone", "one bit each"])
def test_when_none_is_left_each_reason_is_said_and_nothing_starts_afresh(root, how):
    """R11."""
    for path in root.glob("step-*"):
        if how == "commit files gone":
            (path / "commit.json").unlink()
        else:
            file = path / ".metadata"
            file.write_bytes(file.read_bytes()[:-1] + b"x")
    listing = sorted(str(p) for p in root.parent.rglob("*"))
    with pytest.raises(UsageError) as caught:
        run(root.parent.parent, *OPTIONS)
    for step in (2, 4, 6):
        assert f"step-{step:07d}: " in str(caught.value)
    assert "checkpoint.resume=never" in str(caught.value)
    assert sorted(str(p) for p in root.parent.rglob("*")) == listing


@pytest.mark.row("R09")
def test_a_run_goes_on_from_the_newest_sound_one_and_ends_as_if_nothing_was(made, tmp_path, capsys):
    """R09: the refused one is named in one line, and replaced by the same."""
    shutil.copytree(made, tmp_path / "run" / "checkpoints")
    file = tmp_path / "run" / "checkpoints" / "step-0000006" / "__0_0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    run(tmp_path, *OPTIONS)
    said = capsys.readouterr().out
    assert "refused checkpoint" in said
    assert "'__0_0_0.distcp' was changed" in said
    assert "resuming from" in said
    assert "at step 4" in said
    assert same(tensors(tmp_path / "run"), tensors(made / "step-0000006"))
    assert integrity.sound(newest(tmp_path / "run" / "checkpoints")) is None


def test_format_1_loads_with_a_line_and_missing_fields_are_as_by_default(root, capsys):
    path = newest(root)
    facts = json.loads((path / "commit.json").read_text())
    kept = ("step", "elapsed", "tokens", "world", "optim", "seed", "data", "codec", "torch")
    model = {k: v for k, v in facts["model"].items() if k not in ("gains", "base_width")}
    old = {"format": 1, "model": model} | {key: facts[key] for key in kept}
    (path / "commit.json").write_text(json.dumps(old))
    for other in ("step-0000002", "step-0000004"):
        shutil.rmtree(root / other)
    held = tensors(path)
    run(root.parent.parent, *OPTIONS, "schedule.steps=8", "schedule=constant")
    said = capsys.readouterr().out
    assert "is of format 1, without digests: not verified" in said
    assert "at step 6" in said
    run(root.parent.parent, "optim=muon", "schedule.steps=6", f"checkpoint.resume={path}", name="x")
    assert same(tensors(root.parent.parent / "x"), held)
    with pytest.raises(UsageError, match="model.gains is False in"):
        run(root.parent.parent, "model.gains=true", f"checkpoint.resume={path}", name="y")
    (path / "__0_0_0.distcp").write_bytes(b"short")
    assert "'__0_0_0.distcp' ends before" in integrity.sound(path)
