import json
import math

import pytest
import torch

from geon.benches import contestants as bench_contestants
from geon.benches import problems as bench_problems
from geon.benches import solver as bench_solver
from geon.benches import step as bench_step
from geon.optim import Polar, Spectral, Stiefel
from geon.optim.solvers import lgm

KEYS = {
    "solver", "form", "dtype", "case", "d_out", "d_in", "rho", "tangency", "spectral_norm", "n3",
    "n3_symmetric_half", "n3_muon", "seconds", "muon_seconds", "over_muon", "fallbacks", "gap",
    "seed", "batch",
}  # fmt: skip
LABELS = {
    ("oneshot", "-", "fp32"), ("oneshot", "-", "bf16"), ("lgm", "gram", "fp32"),
    ("lgm", "gram", "bf16x3"), ("lgm", "rect", "fp32"), ("lgm", "rect", "bf16"),
    ("lgm", "rect", "bf16+x3"),
    ("lgm(1)", "gram", "fp32"), ("published", "-", "fp32"), ("muon", "-", "fp32"),
    ("muon", "-", "bf16"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(bench_contestants, "ENOUGH", 0.0)


def measured(tmp_path, *options):
    out = tmp_path / "out.json"
    assert bench_solver.main(["--repeats", "1", "--raw", "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_report_has_every_solver_on_tall_wide_and_square(tmp_path, capsys):
    options = ("--size", "16", "--ratios", "1,2", "--wide", "2", "--cases", "gauss", "--seeds", "1")
    report = measured(tmp_path, *options)
    rows = report["rows"]
    assert set(report) == {"hardware", "versions", "rows"}
    assert set(report["versions"]) == {"python", "torch"}
    assert all(set(row) >= KEYS for row in rows)
    for shape in ((16, 16), (32, 16), (16, 32)):
        own = [row for row in rows if (row["d_out"], row["d_in"]) == shape]
        assert {(row["solver"], row["form"], row["dtype"]) for row in own} == LABELS
        rho = {(row["solver"], row["form"], row["dtype"]): row["rho"] for row in own}
        assert rho["lgm", "gram", "fp32"] > rho["oneshot", "-", "fp32"] > rho["muon", "-", "fp32"]
    assert all(row["gap"] < 1e-5 and row["seconds"] > 0 and row["fallbacks"] == 0 for row in rows)
    constrained = [row for row in rows if row["solver"] in ("oneshot", "lgm", "lgm(1)")]
    assert max(row["tangency"] for row in constrained) < 1e-5
    assert max(row["spectral_norm"] for row in rows if row["solver"] == "lgm") < 1.005
    page = capsys.readouterr().out
    assert page.index("gauss 16x16 (r = 1)") < page.index("gauss 16x32 (r = 2), 1 problem\n")
    assert "lgm gram bf16x3" in page


def test_wide_problems_score_as_their_transposes(tmp_path):
    options = ("--size", "16", "--ratios", "2", "--wide", "2", "--seeds", "1", "--cases", "spike")
    rows = measured(tmp_path, *options, "--solvers", "lgm-gram-fp32")["rows"]
    tall, wide = (next(row for row in rows if row["d_out"] == d_out) for d_out in (32, 16))
    assert 0.98 < tall["rho"] <= 1.0 + 1e-6
    assert 0.98 < wide["rho"] <= 1.0 + 1e-6
    assert tall["n3"] == pytest.approx(wide["n3"])


@pytest.mark.parametrize("shape", [(48, 16), (64, 16), (12, 60)])
def test_counted_products_are_those_of_the_formula(shape):
    """The rest: 12 power iterations of two mat-vecs, each the n-th part of a product."""
    n, ratio = min(shape), max(shape) / min(shape)
    problem = next(bench_problems.random_problems(["gauss"], [shape], 1))
    power = 2 * lgm.POWER_STEPS / n
    for refine in (0, 1):
        solver = bench_contestants.rung("fp32", form="gram", refine=refine)
        n3, half = bench_contestants.products(solver, problem.grad, problem.weight)
        assert n3 - power == pytest.approx(lgm.gram_products(ratio, refine) + 2 * ratio, rel=1e-6)
        assert half < 0.85 * n3
    solver = bench_contestants.rung("fp32", form="rect")
    n3, _ = bench_contestants.products(solver, problem.grad, problem.weight)
    factors = 2 * Polar().flops(shape) / (2 * n**3)
    wanted = lgm.rectangular_products(ratio) + factors + 2 * ratio
    assert n3 - power == pytest.approx(wanted, rel=1e-6)


def test_symmetric_products_of_muon_count_half():
    """A step has X^T X (r), its square (1) and the update (r): the first two are symmetric."""
    problem = next(bench_problems.random_problems(["gauss"], [(64, 16)], 1))
    for dtype in ("fp32", "bf16"):
        muon = bench_contestants.muon(dtype)
        counted = bench_contestants.products(muon, problem.grad, problem.weight)
        assert counted == pytest.approx((5 * (4 + 1 + 4), 5 * (2 + 0.5 + 4)))


def test_batches_are_timed_whole_and_counted_by_the_matrix(tmp_path):
    options = ("--shape", "32x16", "--solvers", "lgm-gram-fp32", "--seeds", "1", "--cases", "gauss")
    one, many = (measured(tmp_path, *options, "--batch", str(b))["rows"] for b in (1, 4))
    assert [row["batch"] for row in many] == [4]
    assert many[0]["n3"] == pytest.approx(one[0]["n3"])
    assert many[0]["n3_symmetric_half"] == pytest.approx(one[0]["n3_symmetric_half"])
    assert many[0]["n3_muon"] == pytest.approx(25)


def test_recorded_pairs_of_any_scale(tmp_path):
    weight = 3.7 * Stiefel().random_point((12, 48), torch.Generator().manual_seed(1))
    grad = 1e-5 * torch.randn(12, 48, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "pairs.pt"
    torch.save({"blocks.0.down": [(25, weight, grad), (105, weight, 2 * grad)]}, path)
    rows = measured(tmp_path, "--pairs", str(path), "--solvers", "lgm-gram-fp32")["rows"]
    assert [row["case"] for row in rows] == [f"pairs/blocks.0.down/{s}" for s in (25, 105)]
    assert all(row["rho"] > 0.99 and row["tangency"] < 1e-5 for row in rows)
    assert rows[0]["rho"] == pytest.approx(rows[1]["rho"], abs=1e-6)
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


def test_without_rho_the_optimum_is_not_sought(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_problems, "certified_optimum", None)
    options = ("--shape", "16x64", "--no-rho", "--cases", "gauss", "--solvers", "oneshot")
    rows = measured(tmp_path, *options)["rows"]
    assert all(row["rho"] is None and row["gap"] is None for row in rows)
    assert all(row["tangency"] < 1e-5 for row in rows)


def test_published_at_its_own_settings_beside_lgm(tmp_path, capsys):
    options = ("--published-own-settings", "--shape", "32x16", "--cases", "spike", "--seeds", "1")
    rows = measured(tmp_path, *options)["rows"]
    theirs, ours = rows
    assert (theirs["solver"], theirs["dtype"]) == ("published(own)", "bf16")
    assert theirs["n3"] > 50 * ours["n3"]
    assert theirs["tangency"] > 0.05 > 1e-5 > ours["tangency"]
    assert "32x16" in capsys.readouterr().out.splitlines()[-1]


def test_ablation_changes_constants_and_puts_them_back(tmp_path):
    before = {key: value for key, value in vars(lgm).items() if key.isupper()}
    options = ("--ablate", "--size", "16", "--ratios", "4", "--cases", "gauss", "--seeds", "2")
    report = measured(tmp_path, *options)
    found = {row["setting"]: row for row in report["ablation"]}
    assert before == {key: value for key, value in vars(lgm).items() if key.isupper()}
    assert not {"rows", "quality", "costs"} & set(report)
    assert found["CG_STEPS 2"]["n3_at_ratio_4"] == found["as is"]["n3_at_ratio_4"] - 3
    assert found["JITTER 0.01"]["spectral_norm"] == pytest.approx(math.sqrt(1.01), abs=1e-4)
    assert found["as is"]["spectral_norm"] == pytest.approx(math.sqrt(1 + lgm.JITTER), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--solvers", "lgm-gramm-fp32"], "Did you mean 'lgm-gram-fp32'"),
        (["--cases", "gaus"], "gauss, spike, decay, rank"),
        (["--ratios", "0.5"], "--ratios"),
        (["--ratios", "a"], "--ratios"),
        (["--shape", "64"], "768x3072"),
        (["--pairs", "no-such-file"], "--pairs 'no-such-file'"),
        (["--pairs", __file__], "is no torch file of {name"),
        (["--json", "no-such-folder/x.json"], "there is no folder 'no-such-folder'"),
        (["--ablate", "--ratios", "1"], "--ablate"),
    ],
)
def test_bad_options_are_told_in_one_line(options, told, capsys):
    assert bench_solver.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("geon: error: ") and told in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert bench_step.main(["--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weight", "told"),
    [(torch.ones(8, 4), "off a multiple of I"), (torch.ones(4, 4), "must be matrices alike")],
)
def test_recorded_weights_must_be_on_the_manifold(tmp_path, capsys, weight, told):
    path = tmp_path / "pairs.pt"
    torch.save({"up": [(5, weight, torch.ones(8, 4))]}, path)
    assert bench_solver.main(["--pairs", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_cases_have_the_spectra_of_their_names():
    i = torch.arange(32) / 32
    wanted = {
        "spike": 60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i),
        "decay": 10 ** (-4 * i),
    }
    for case, spectrum in wanted.items():
        problem = next(bench_problems.random_problems([case], [(32, 128)], 1))
        torch.testing.assert_close(
            torch.linalg.svdvals(problem.grad), spectrum, rtol=1e-3, atol=1e-5
        )
        assert Stiefel().residual(problem.weight) < 2e-6
    low = next(bench_problems.random_problems(["rank"], [(128, 32)], 1)).grad
    assert torch.linalg.matrix_rank(low, rtol=1e-5) == 4
    assert Spectral().factor(low.shape) == 2.0


def test_a_step_of_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "step.json"
    options = ["--layers", "1", "--width", "16", "--repeats", "1", "--json", str(out)]
    assert bench_step.main(options) == 0
    report = json.loads(out.read_text())
    assert report["matrices"] == 6
    assert set(report["seconds"]) == {"muon", "manifold muon", "oneshot"}
    assert report["over_muon"]["muon"] == 1.0
    assert all(value > 0 for value in report["seconds"].values())
    assert report["flops_over_muon"]["manifold muon"] > 1.0
    assert "6 matrices of 1 layers, width 16" in capsys.readouterr().out


def test_drift_is_told_ten_times_and_stays_at_rounding(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "DRIFT_SHAPE", (32, 16))
    out = tmp_path / "drift.json"
    assert bench_step.main(["--drift", "25", "--json", str(out)]) == 0
    found = json.loads(out.read_text())["drift"]
    assert len(found) == 10 and found[-1]["step"] == 25
    assert all(0.0 < row["residual"] < 3e-6 for row in found)


def test_a_number_of_seeds_has_a_range(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_solver.main(["--seeds", "0"])
    assert "--seeds: 0 is not between 1" in capsys.readouterr().err
