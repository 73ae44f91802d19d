"""What the studies read out of curves: checked on curves whose answers are known."""

import json
import math

import pytest

from geon.launch.sweep import Job
from geon.studies import compare, leaderboard, transfer
from geon.studies import shared as studies

RATES = [2.0**-k for k in range(9, 3, -1)]


def bowl(best, seeds=(0, 1, 2), depth=1.0):
    """Loss depth + (log2 lr - log2 best)^2 / 10, each seed lifted by its own number."""
    return {
        lr: {s: depth + 0.1 * math.log2(lr / best) ** 2 + 0.01 * s for s in seeds} for lr in RATES
    }


@pytest.mark.parametrize("best", [2.0**-6, 2.0**-6.4, 2.0**-7.3])
def test_the_best_rate_of_a_parabola_is_found_between_grid_points(best):
    found, inside = transfer.best_lr(bowl(best))
    assert found == pytest.approx(best)
    assert inside


@pytest.mark.parametrize("best", [2.0**-12, 2.0**-2])
def test_a_best_rate_at_the_edge_is_told(best):
    found, inside = transfer.best_lr(bowl(best))
    assert found in (RATES[0], RATES[-1])
    assert not inside


def test_spread_slope_and_regret_of_an_optimum_that_moves_one_octave_a_width():
    widths = {32 * 2**k: bowl(2.0 ** (-5 - k), depth=2.0 - 0.1 * k) for k in range(4)}
    found = transfer.verdict(widths)
    assert found["spread_octaves"] == pytest.approx(3.0)
    assert found["slope"] == pytest.approx(-1.0)
    assert found["regret"] == pytest.approx(0.1 * 9)
    assert found["regret_sem"] == pytest.approx(0.0, abs=1e-12)
    assert found["lr_star"]["256"] == pytest.approx(2.0**-8)


def test_an_optimum_that_stays_has_no_spread_and_no_regret():
    found = transfer.verdict({32: bowl(2.0**-6), 256: bowl(2.0**-6, depth=0.9)})
    assert found["spread_octaves"] == pytest.approx(0.0, abs=1e-9)
    assert found["regret"] == 0.0
    assert found["best_loss"]["256"] == pytest.approx(0.91)


def test_a_rate_that_diverged_for_one_seed_is_not_the_best():
    curve = bowl(2.0**-6)
    curve[2.0**-4] = {0: 0.0}
    assert transfer.best_lr(curve)[0] == pytest.approx(2.0**-6)


def test_tokens_to_a_loss_lie_on_the_line_between_evaluations():
    points = [(100.0, 3.0), (200.0, 2.0), (300.0, 1.0)]
    assert leaderboard.tokens_to(points, 1.25) == pytest.approx(275.0)
    assert leaderboard.tokens_to(points, 3.5) == 100.0
    assert leaderboard.tokens_to(points, 0.5) is None


def finished(folder, arm, point, loss, curve=()):
    """A job whose report says what a real one's does."""
    name = "-".join([arm, *(f"{v:g}" for v in point.values())])
    job = Job(arm, dict(point), name, [], 1, folder / name)
    job.folder.mkdir(parents=True)
    report = {
        "val_nats_per_byte": loss,
        "val_nats_per_token": None,
        "tokens": 400,
        "parameters": 100,
        "optimizer_state_bytes": 800,
        "optimizer_share": 0.25,
        "train_seconds": 1.0,
    }
    (job.folder / "report.json").write_text(json.dumps(report))
    rows = [
        {"kind": "eval", "step": i, "tokens": t, "val_nats_per_byte": v, "val_nats_per_token": v}
        for i, (t, v) in enumerate(curve)
    ]
    (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return job


def test_the_leaderboard_takes_the_best_rate_its_seeds_and_adamws_loss(tmp_path):
    curve = [(200, 2.0), (400, 1.0)]
    arms = (("adamw", 1.5), ("adamw_rates", 1.2), ("ours", 1.0))
    search = [
        finished(tmp_path, arm, {"optim.lr": lr, "seed": 0}, loss + abs(lr - 2), curve)
        for arm, loss in arms
        for lr in (1.0, 2.0, 4.0)
    ]
    more = [
        finished(tmp_path, arm, {"optim.lr": 2.0, "seed": seed}, loss + 0.1 * seed, curve)
        for arm, loss in arms
        for seed in (1, 2)
    ]
    found = leaderboard.verdict(search, more)
    assert list(found) == ["ours", "adamw_rates", "adamw"]
    ours = found["ours"]
    assert ours["loss"] == pytest.approx(1.1)
    assert ours["sem"] == pytest.approx(0.1 / math.sqrt(3))
    assert (ours["seeds"], ours["lr"], ours["lr_inside_grid"]) == (3, 2.0, True)
    assert ours["tokens_to_adamw"] == pytest.approx(280.0)  # down to 1.6, adamw's mean
    assert ours["tokens_to_adamw_rates"] == pytest.approx(340.0)
    assert (ours["state_bytes_per_param"], ours["step_share"]) == (8.0, 0.25)
    assert "| ours | 1.1000 ± 0.0577 | 0.70 | 0.85 | 8.00 | 25% | 2 |" in leaderboard.table(found)
    leaderboard.picture(found)


def test_an_arm_whose_jobs_all_failed_is_left_out(tmp_path):
    gone = Job("gone", {"optim.lr": 1.0, "seed": 0}, "gone", [], 1, tmp_path / "gone")
    there = finished(tmp_path, "ours", {"optim.lr": 1.0, "seed": 0}, 1.0)
    found = leaderboard.verdict([gone, there], [])
    assert list(found) == ["ours"]
    assert not found["ours"]["lr_inside_grid"]


def test_a_comparison_takes_the_best_rate_at_each_value(tmp_path):
    jobs = [
        finished(
            tmp_path,
            arm,
            {"data.batch_tokens": batch, "optim.lr": lr, "seed": seed},
            base + abs(lr - batch) + 0.1 * seed,
        )
        for arm, base in (("a", 1.0), ("b", 2.0))
        for batch in (1, 2)
        for lr in (0.0, 1.0, 2.0)
        for seed in (0, 1)
    ]
    found = compare.verdict(jobs, "data.batch_tokens")
    assert found["a"]["1"]["loss"] == pytest.approx(1.05)
    assert (found["a"]["1"]["lr"], found["a"]["1"]["lr_inside_grid"]) == (1.0, True)
    assert (found["b"]["2"]["lr"], found["b"]["2"]["lr_inside_grid"]) == (2.0, False)
    assert "1.0500 ± 0.0500 at 1 |" in compare.table(found)
    compare.picture(found, "data.batch_tokens")


def test_a_dry_run_counts_every_job_and_runs_none(tmp_path, capsys):
    others = ("scion", "uscion", "muon", "manifold_muon", "adamw", "adamw_mup")
    told = [f"sweep.arms.{arm}=null" for arm in others]
    told += ["sweep.arms.hybrid.grid={optim.lr:[0.01]}", "--dry-run", f"output={tmp_path}"]
    told += ["--out", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        transfer.main(told)
    assert left.value.code == 0
    assert "12 of 12 jobs to run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_mean_and_standard_error():
    assert studies.mean_sem([1.0]) == (1.0, 0.0)
    mean, sem = studies.mean_sem([1.0, 2.0, 3.0])
    assert (mean, sem) == (2.0, pytest.approx(1 / math.sqrt(3)))
