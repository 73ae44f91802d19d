"""The study of equal searches: on jobs whose losses are a formula, so that the answer is known."""

import json
import math

import pytest

from geon.launch.sweep import Job, job_name
from geon.studies import evidence
from geon.studies import shared as studies

BASE = {"hybrid": 1.0, "muon": 1.1, "adamw": 1.5}
BEST = {"hybrid": 0.04, "muon": 0.04, "adamw": 0.004}


def loss(job):
    """Least at the arm's best rate, twice the configured rates of the ends, and no decay."""
    at = job.point
    value = BASE[job.arm] + 0.1 * math.log2(at["optim.lr"] / BEST[job.arm]) ** 2
    value += 0.01 * at["seed"] + (at["schedule.steps"] < 600)
    double = {"hybrid": 2.0, "muon": 2.0, "adamw": 16.0}[job.arm]
    value += 0.1 * (at.get("optim.embedding.lr_scale") != double)
    return value + 0.1 * (at.get("optim.hidden.weight_decay") != 0.0)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Have the sweep's jobs finish at once with the loss of their point; the jobs that ran."""
    ran = []

    def make_job(config, told, arm, point):
        name = job_name(arm, point)
        optim = f"optim={arm}", *(f"{k}={v}" for k, v in point.items() if k.startswith("optim."))
        ends = ["optim.embedding.lr_scale=8"] * (
            arm == "adamw" and "optim.embedding.lr_scale" not in point
        )
        arguments = [*optim, *ends, f"schedule.steps={point.get('schedule.steps', 600)}"]
        return Job(arm, dict(point), name, arguments, 1, tmp_path / "runs" / name)

    def jobs_of(sweep, overrides):
        rates = {arm: [lr / 2, lr, 2 * lr] for arm, lr in BEST.items()}
        points = [(arm, lr) for arm in BASE for lr in rates[arm]]
        at = {"schedule.steps": 150, "seed": 0}
        return None, [], [make_job(None, [], arm, {"optim.lr": lr, **at}) for arm, lr in points]

    def finish(jobs, told, config):
        for job in () if told.read else [job for job in jobs if job.report is None]:
            job.folder.mkdir(parents=True)
            value = loss(job)
            report = {
                "val_nats_per_byte": value,
                "tokens": 100,
                "parameters": 10,
                "optimizer_state_bytes": 40,
                "optimizer_share": 0.1,
                "train_seconds": 1.0,
            }
            (job.folder / "report.json").write_text(json.dumps(report))
            rows = [
                {"kind": "eval", "step": i, "tokens": t, "val_nats_per_byte": value + d}
                for i, (t, d) in enumerate([(50, 1.0), (100, 0.0)])
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (job.folder / "metrics.jsonl").write_text(lines)
            ran.append(job)

    monkeypatch.setattr(studies, "jobs_of", jobs_of)
    monkeypatch.setattr(studies, "finish", finish)
    monkeypatch.setattr(evidence, "make_job", make_job)
    return ran


def test_arms_search_alike_and_their_best_settings_run_whole(tmp_path, ran):
    words = ["--out", str(tmp_path)]
    assert evidence.main(words) == 0
    content = json.loads((tmp_path / "results" / "evidence.json").read_text())
    rows = content["optimizers"]
    assert list(rows) == ["hybrid", "muon", "adamw"]
    for arm, row in rows.items():
        assert row["loss"] == pytest.approx(BASE[arm] + 0.01), arm
        assert row["lr"] == pytest.approx(BEST[arm])
        assert row["lr_inside_grid"]
        assert row["runs_searched"] == 8
        steps = [job.point["schedule.steps"] for job in ran if job.arm == arm]
        assert steps == [150] * 7 + [600] * 4  # one at half the rate
    assert rows["hybrid"]["minus_muon"] == pytest.approx([-0.1, 0.0])
    assert rows["hybrid"]["settings"]["optim.hidden.weight_decay"] == 0.0
    # down a line from 2.01 at half the tokens to 1.01 at all of them: adamw's 1.51 is half way
    assert rows["hybrid"]["tokens_to_adamw"] == pytest.approx(0.75)
    assert rows["hybrid"]["state_bytes_per_param"] == 4.0
    assert "| hybrid | 1.0100 ± 0.0058 | -0.1000 ± 0.0000 |" in evidence.table(content)

    ran.clear()
    assert evidence.main(words) == 0
    assert ran == []


def test_an_arm_that_is_not_there_is_named(tmp_path, ran, capsys):
    assert evidence.main(["--out", str(tmp_path), "--arms", "mun"]) == 2
    assert "--arms mun: sweep=evidence has hybrid, muon, adamw" in capsys.readouterr().err
