"""Resume: exact on the same ranks, close on others, refused for another model."""

import json
import shutil

import pytest
import torch

from tests.distributed.jobs import distance, metrics, train, weights

pytestmark = pytest.mark.dist

HALF = ["checkpoint.every=10", "checkpoint.keep=5"]


def cut_back(folder):
    """Leave a run as if it had died after step 10's checkpoint, with later lines logged."""
    shutil.rmtree(folder / "checkpoints" / "step-0000020")
    (folder / "report.json").unlink()
    leftover = folder / "checkpoints" / "step-0000015.writing"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_exact_on_the_same_ranks(tmp_path, ranks):
    run = train(tmp_path, "run", ranks, *HALF)
    whole = weights(run)
    before = {r["step"]: r["loss"] for r in metrics(run, "train")}
    cut_back(run)
    train(tmp_path, "run", ranks, *HALF)
    resumed = weights(run)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    rows = metrics(run, "train")
    assert [r["step"] for r in rows] == [10, 20]  # no step is logged twice
    assert {r["step"]: r["loss"] for r in rows} == before
    assert not list((run / "checkpoints").glob("*.writing"))
    assert (run / "checkpoints" / "latest").read_text() == "step-0000020"
    # Once more at the end: nothing is trained, everything is reported again.
    train(tmp_path, "run", ranks, *HALF)
    assert all(torch.equal(whole[k], v) for k, v in weights(run).items())


@pytest.mark.parametrize(("first", "then"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 3)])
def test_resume_on_other_ranks_reads_the_same_tokens(tmp_path, first, then):
    batch = "data.batch_tokens=3072"
    run = train(tmp_path, "run", first, batch, *HALF)
    whole = weights(run)
    cut_back(run)
    train(tmp_path, "run", then, batch, *HALF)
    assert distance(whole, weights(run)) <= 1e-5


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was cut back to its half, saved on four ranks, FSDP2 x tensor parallel."""
    folder = tmp_path_factory.mktemp("half")
    run = train(folder, "run", 4, "parallel=fsdp_tp", "data.batch_tokens=3072", *HALF)
    whole = weights(run)
    cut_back(run)
    return run, whole


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "single"),
        (2, "tp"),
        *(pytest.param(*one, marks=pytest.mark.slow)
          for one in ((2, "ddp"), (3, "deepspeed_z3"), (4, "hsdp"))),
    ],
)  # fmt: skip
def test_a_run_goes_on_in_any_other_layout(half, tmp_path, ranks, layout):
    saved, whole = half
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    train(tmp_path, "run", ranks, f"parallel={layout}", "data.batch_tokens=3072", *HALF)
    assert [r["step"] for r in metrics(run, "train")] == [10, 20]
    assert distance(whole, weights(run)) <= 1e-5


def test_what_deepspeed_saves_is_read_by_others(tmp_path):
    """NorMuon's second moments too, which are whole on every rank."""
    options = ["optim=normuon", "optim.max_norm=0", "data.batch_tokens=3072", *HALF]
    run = train(tmp_path, "run", 3, "parallel=deepspeed_z1", *options)
    whole = weights(run)
    cut_back(run)
    train(tmp_path, "run", 2, "parallel=fsdp", *options)
    assert distance(whole, weights(run)) <= 1e-5


def test_retention_and_uncommitted_folders(tmp_path):
    run = train(tmp_path, "run", 1, "checkpoint.every=4", "checkpoint.keep=2")
    names = sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())
    assert names == ["step-0000016", "step-0000020"]
    (run / "checkpoints" / "step-0000020" / "commit.json").unlink()
    done = train(tmp_path, "run", 1, "checkpoint.every=4", ok=False)
    assert "step-0000016 at step 16" in done.stdout


def test_another_model_is_refused_and_nothing_is_lost(tmp_path):
    run = train(tmp_path, "run", 1)
    listing = sorted(p.name for p in run.rglob("*"))
    for options, words in (
        (["model.d_model=64"], "model.d_model is 32 in"),
        (["model=gpt2"], "model.arch is gpt in"),
        (["optim=adamw"], "optim.name is hybrid in"),
    ):
        done = train(tmp_path, "run", 1, *options, ok=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in run.rglob("*")) == listing


def test_resume_never_moves_the_old_run_aside(tmp_path):
    run = train(tmp_path, "run", 1)
    report = (run / "report.json").read_text()
    train(tmp_path, "run", 1, "checkpoint.resume=never", "seed=1")
    assert (tmp_path / "run~1" / "report.json").read_text() == report
    assert json.loads((run / "report.json").read_text()) != json.loads(report)
