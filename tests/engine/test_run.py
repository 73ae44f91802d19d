"""One run from the command line: what it leaves, what it refuses, what it logs."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from geon.launch import local
from geon.scripts import generate, plot
from geon.studies import first_run_report
from tests.distributed.jobs import STIEFEL, TINY, metrics, report, train, weights

pytestmark = pytest.mark.dist

TEXT = ["data=text", "data.vocab_size=256", "data.tokens=0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short run on real text with everything switched on."""
    root = tmp_path_factory.mktemp("runs")
    words = "the quick brown fox jumps over the lazy dog, and then again.\n"
    (root / "text").mkdir()
    for i in range(40):
        (root / "text" / f"{i}.txt").write_text(words * (50 + i))
    return train(
        root,
        "everything",
        1,
        *TEXT,
        f"data.path={root / 'text'}",
        "eval.every=10",
        "eval.sample_tokens=30",
        "logger.spectrum_every=5",
        *STIEFEL,
        "logger=tensorboard",
    )


def test_the_folder_holds_what_is_promised(folder):
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "plan.json",
        "loss.png",
        "spectrum.png",
        "sample.txt",
        "report.json",
        "checkpoints",
        "tensorboard",
    }
    for picture in ("loss.png", "spectrum.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert "${" not in (folder / "config.yaml").read_text()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["vocab_size"] == 256
    assert (folder / "sample.txt").read_text().startswith("def ")


def test_the_log_tells_loss_rate_share_and_geometry(folder):
    row = metrics(folder, "train")[-1]
    assert row["step"] == 20
    assert row["matrices_orthogonalized"] == 12
    assert 0 < row["optimizer_share"] < 1
    assert row["tokens_per_second"] > 0
    assert row["peak_memory_bytes"] > 2**26  # an interpreter with torch, at the least
    assert [r["step"] for r in metrics(folder, "eval")] == [10, 20]
    spectra = metrics(folder, "spectrum")
    assert [r["step"] for r in spectra] == [0, 5, 10, 15, 20]
    for r in spectra:  # on the manifold all singular values are the radius
        assert r["manifold_residual"] < 1e-5
        assert r["singular_values"] == pytest.approx([2.0] * 7, rel=1e-4)


def test_the_report_compares_like_with_like(folder, capsys):
    facts = report(folder)
    assert facts["val_bytes"] == facts["val_tokens"] == 2048
    assert facts["peak_memory_bytes"] >= facts["peak_memory_bytes_predicted"] > 2**20
    assert 0 < facts["zlib"] < facts["order0"]
    assert first_run_report.main([str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["val_nats_per_byte"] == facts["val_nats_per_byte"]
    assert set(told) >= {
        "val_nats_per_byte",
        "zlib",
        "bz2",
        "train_seconds",
        "tokens",
        "matrices_orthogonalized_per_step",
        "optimizer_share",
    }


def test_generate_continues_a_prompt_the_same_way_twice(folder, capsys):
    told = []
    for _ in range(2):
        assert generate.main([str(folder), "--prompt", "the qu", "--tokens", "20"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert told[0].startswith("the qu")
    assert generate.main([str(folder / "nothing")]) == 2
    assert "no committed checkpoint" in capsys.readouterr().err


def test_plots_are_drawn_again(folder, capsys):
    (folder / "loss.png").unlink()
    assert plot.main([str(folder)]) == 0
    assert (folder / "loss.png").exists()
    assert plot.main([str(folder.parent)]) == 2


def test_bpe_text_and_bins_train(tmp_path):
    import numpy as np

    from geon.data import write_bin

    (tmp_path / "a.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(4000)))
    run = train(
        tmp_path,
        "bpe",
        1,
        "data=text",
        f"data.path={tmp_path / 'a.txt'}",
        "data.bpe_vocab=300",
        "data.vocab_size=300",
        "schedule.steps=3",
        "eval.sample_tokens=5",
    )
    facts = report(run)
    assert facts["val_nats_per_byte"] < facts["val_nats_per_token"]
    assert generate.main([str(run), "--tokens", "5"]) == 0
    rng = np.random.default_rng(0)
    for name in ("train_0", "train_1", "val_0"):
        write_bin(tmp_path / f"{name}.bin", rng.integers(0, 64, 9000))
    run = train(
        tmp_path,
        "bins",
        2,
        "data=bins",
        f"data.train={tmp_path}/train_*.bin",
        f"data.val={tmp_path}/val_*.bin",
        "schedule.steps=3",
    )
    assert report(run)["val_nats_per_byte"] is None


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bf16_with_checkpointed_activations_trains(tmp_path, ranks):
    run = train(
        tmp_path,
        "bf16",
        ranks,
        "optim=muon",
        "parallel=fsdp",
        "parallel.precision=bf16",
        "parallel.activation_checkpointing=true",
        "optim.polar.dtype=bf16",
    )
    plain = train(tmp_path, "fp32", 1, "optim=muon")
    ours, reference = (metrics(r, "train")[-1]["loss"] for r in (run, plain))
    assert ours != reference
    assert ours == pytest.approx(reference, abs=0.03)
    assert all(w.dtype == torch.float32 for w in weights(run).values())


def test_wandb_works_offline_and_its_key_is_written_nowhere(tmp_path, monkeypatch):
    canary = "c0ffee" * 6 + "abcd"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    run = train(tmp_path, "logged", 1, "logger=wandb", "schedule.steps=3")
    offline = list(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(offline) == 1 and offline[0].stat().st_size > 0
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in written if canary.encode() in p.read_bytes()]


def test_the_budget_ends_a_slow_run_annealed(tmp_path):
    run = train(
        tmp_path, "slow", 1, "schedule.steps=100000", "schedule.budget_seconds=3", "logger.every=1"
    )
    rows = metrics(run, "train")
    assert 2.5 < rows[-1]["elapsed"] < 6
    assert rows[-1]["lr_fraction"] < 0.1


REFUSED = [
    (["data=text", "data.path=/does/not/exist"], "data.path '/does/not/exist' does not exist"),
    (["data.batch_tokens=2000"], "nearest that divides is"),
    (["optim=manifold_muon", "model.zero_init_proj=true"], "model.zero_init_proj=false"),
    (["optim=manifold_muon", "optim.hidden.weight_decay=0.1"], "set weight_decay to 0"),
    (["optim.hidden.manifold=stifel"], "Did you mean 'stiefel'?"),
    (["checkpoint.resume=/does/not/exist"], "holds no committed checkpoint"),
    (["data.tokens=100"], "do not fill one window of model.context 64"),
    (["logger.wandb_mode=on"], "logger.wandb_mode must be one of"),
    (["name=../escape"], "it names a folder"),
    (["+optim.hidden.lrr=1"], "Did you mean 'optim.hidden.lr'?"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, options, words):
    done = train(tmp_path, "bad", 1, *options, ok=False)
    assert done.returncode == 2
    assert done.stderr.startswith("geon: error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_data_on_two_ranks_ends_both(tmp_path):
    shard = tmp_path / "train.bin"
    shard.write_bytes(b"\x00" * 2000)
    (tmp_path / "val.bin").write_bytes(b"\x00" * 2000)
    files = [f"data.train={shard}", f"data.val={tmp_path / 'val.bin'}"]
    done = train(tmp_path, "bad", 2, "data=bins", *files, ok=False)
    assert done.returncode != 0
    assert "starts with 0, not the magic 20240520" in done.stderr
    assert not (tmp_path / "bad").exists()


def test_divergence_stops_with_the_step(tmp_path):
    done = train(
        tmp_path,
        "nan",
        1,
        "optim=adamw",
        "optim.lr=1e30",
        "optim.hidden.weight_decay=0",
        "optim.head.weight_decay=0",
        "logger.every=2",
        "schedule.shape=constant",
        ok=False,
    )
    assert done.returncode != 0
    assert re.search(r"step \d+: a gradient of '.*' and \d+ more is not finite", done.stderr)


def test_multirun_runs_one_process_jobs(tmp_path):
    command = [sys.executable, str(local.ROOT / "train.py"), "-m", *TINY, "schedule.steps=2"]
    command += ["seed=0,1", f"output={tmp_path}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    configs = [yaml.safe_load(p.read_text()) for p in tmp_path.glob("run-*/config.yaml")]
    assert {c["seed"] for c in configs} == {0, 1}
    assert len(list(tmp_path.glob("run-*/report.json"))) == 2
