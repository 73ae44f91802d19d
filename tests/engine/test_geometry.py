"""What a run says of its geometry, the pairs that it records, and averages of its checkpoints."""

import pytest
import torch

from geon.engine import checkpoint
from geon.engine.geometry import PAIRS
from geon.optim.manifolds import Stiefel
from geon.scripts import generate, merge
from tests.distributed.jobs import STIEFEL, metrics, train, weights

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def folder(request, tmp_path_factory):
    """A short run under FSDP2, or on one process."""
    options = ["parallel=fsdp"] if request.param == 2 else []
    return train(
        tmp_path_factory.mktemp("runs"),
        "geometry",
        request.param,
        *options,
        "logger.geometry_every=10",
        "optim.record_pairs=[1,20]",
        *STIEFEL,
        "checkpoint.every=5",
        "checkpoint.keep=4",
        "logger.every=5",
    )


def test_directions_are_certified_in_the_log(folder):
    rows = metrics(folder, "geometry")
    assert [r["step"] for r in rows] == [10, 20]
    for r in rows:
        assert 0 <= r["gap_median"] <= r["gap_max"] < 0.03
        assert r["tangency_max"] < 1e-5
        assert r["norm_max"] < 1.001
        assert r["residual_max"] < 1e-5
        assert r["spectrum_min"] == pytest.approx(2.0, rel=1e-4)
        assert r["spectrum_max"] == pytest.approx(2.0, rel=1e-4)
    assert all(r["solver_fallbacks"] == 0 for r in metrics(folder, "train"))


def test_recorded_pairs_are_whole_and_on_the_manifold(folder):
    pairs = torch.load(folder / PAIRS, weights_only=True)
    assert len(pairs) == 12
    manifold = Stiefel(radius=2.0)
    for rows in pairs.values():
        assert [step for step, _, _ in rows] == [1, 20]
        for _, weight, momentum in rows:
            assert weight.shape == momentum.shape
            assert manifold.residual(weight) < 1e-5
            assert momentum.abs().max() > 0


def test_merged_checkpoints_are_brought_back_to_the_manifold(folder, tmp_path, capsys):
    out = tmp_path / "mean"
    assert merge.main([str(folder), "--last", "3", "--out", str(out)]) == 0
    facts = checkpoint.read_commit(checkpoint.find(out))
    assert facts["merged"] == ["step-0000010", "step-0000015", "step-0000020"]
    merged, last = weights(out), weights(folder)
    manifold, moved = Stiefel(radius=2.0), 0
    for name, weight in merged.items():
        if name.startswith("blocks."):
            assert manifold.residual(weight) < 1e-5
            moved += bool((weight - last[name]).abs().max() > 1e-4)
    assert moved == 12
    assert merge.main([str(folder), "--last", "3", "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert merge.main([str(folder), "--last", "9", "--out", str(tmp_path / "x")]) == 2
    assert "holds 4 committed" in capsys.readouterr().err
    assert merge.main([str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert generate.main([str(out), "--tokens", "3"]) in (0, 2)  # 2: synthetic tokens have no text


def test_a_mean_of_one_is_that_one(folder, tmp_path):
    out = tmp_path / "same"
    assert merge.main([str(folder), "--last", "1", "--out", str(out)]) == 0
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, weights(folder)[name], atol=2e-6, rtol=0)
