"""Certificates of runs: in the log, by mode=certify, sharded, and by the script that tries them."""

import json

import pytest

from geon.engine.build import make_model
from geon.engine.main import execute
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.optim.modular.bonds import SquaredRelu
from geon.scripts import certify
from tests.distributed.jobs import STIEFEL, TINY, metrics, train

pytestmark = pytest.mark.dist
RUN = [*STIEFEL, "model.fused_qkv=true", "logger.certify_every=5", "schedule.steps=10"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A short run under FSDP2."""
    return train(tmp_path_factory.mktemp("runs"), "sharded", 2, "parallel=fsdp", *RUN)


def printed(capsys, *options):
    config = compose([*TINY, *RUN, "parallel=single", "mode=certify", *options])
    execute(config, Env())
    return capsys.readouterr().out


def test_the_certificate_of_shards_in_the_log_is_that_of_the_checkpoint_on_one_process(
    sharded, capsys, tmp_path
):
    rows = metrics(sharded, "certificate")
    assert [row["step"] for row in rows] == [5, 10]
    assert all(row["conditional"] and row["tokens_observed"] == 4096 for row in rows)
    assert 0 < rows[0]["logits_rms"] <= rows[0]["logits_most"]
    options = [f"output={tmp_path}", "name=other", f"checkpoint.resume={sharded}"]
    out = printed(capsys, *options)
    assert not list(tmp_path.iterdir())
    head = next(line for line in out.splitlines() if line.startswith("head.weight"))
    logits_rms, most, lipschitz = map(float, head.split()[1:4])
    assert lipschitz == pytest.approx(rows[-1]["lipschitz"], rel=2e-3)
    assert logits_rms == pytest.approx(rows[-1]["logits_rms"], rel=2e-3)
    assert most == pytest.approx(rows[-1]["logits_most"], rel=2e-3)
    # On Stiefel of radius 2 the bound of a matrix is its norm.
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("blocks")}
    entered, left = rows["blocks.1.norm2"], rows["blocks.1.up.weight"]
    assert float(left[1]) == pytest.approx(2.0, rel=1e-3)
    assert float(left[3]) / float(entered[3]) == pytest.approx(2.0, rel=2e-3)
    assert "observed over 4,096 tokens" in out


def test_a_model_without_norms_has_no_conditions(capsys):
    out = printed(capsys, "model.norm=none", "model.residual=scaled")
    assert "The bounds hold for every input." in out and "if RMS" not in out


def test_the_search_of_a_run_ends_with_its_verdict(sharded, capsys, tmp_path, monkeypatch):
    told = [str(sharded), "--search", "--pairs", "64", "--ascents", "2", "--steps", "2"]
    assert certify.main([*told, "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out.count("no bound is violated") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["searches"]["pairs"]["tried"] == 64 and found["certificate"]["conditional"]
    monkeypatch.setattr(SquaredRelu, "bound", lambda self, x: (x, 1e-3))
    assert certify.main(told) == 1
    assert "A BOUND IS VIOLATED" in capsys.readouterr().out


def test_what_holds_no_checkpoint_is_refused(tmp_path, capsys):
    assert certify.main([str(tmp_path)]) == 2
    assert "holds no committed checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["gpt2", "gpt_track3"])
@pytest.mark.parametrize("option", ["residual=scaled", "norm=none"])
def test_options_of_gpt_are_refused_elsewhere(arch, option):
    config = compose([*TINY, f"model={arch}", f"model.{option}", "parallel=single"])
    with pytest.raises(UsageError, match=f"model.{option}: {arch} has no such option"):
        make_model(config.model)
