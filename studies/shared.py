"""What the studies share: run a sweep's jobs, gather their losses by arm, seed and value."""

import argparse
import json
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from geon.benches import results
from geon.benches.solver import pick_device
from geon.configs.schema import Config
from geon.engine.metrics import hardware
from geon.launch.compose import compose
from geon.launch.sweep import Job, expand, run_jobs

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Command line of a study: where results go, whether to run, and Hydra overrides."""
    made = argparse.ArgumentParser(prog=f"python -m geon.studies.{name}", description=description)
    made.add_argument("overrides", nargs="*", help="Hydra overrides for every job")
    made.add_argument("--out", type=Path, default=Path("docs"), help="pictures; JSON in results/")
    made.add_argument("--dry-run", action="store_true", help="list the jobs, run none")
    made.add_argument("--read", action="store_true", help="run nothing, read what has finished")
    made.add_argument("--draw", action="store_true", help="only draw, from the result file")
    return made


def jobs_of(sweep: str, overrides: Sequence[str]) -> tuple[Config, list[str], list[Job]]:
    """A sweep's config, the overrides that made it, and its jobs, all checked."""
    told = [f"sweep={sweep}", *overrides]
    config = compose(told)
    return config, told, expand(config, told)


def finish(jobs: Sequence[Job], told: argparse.Namespace, config: Config) -> None:
    """Run the jobs that have not finished, a seed at a time, so that a study cut short is whole.

    A job that fails (diverges) leaves a gap.
    """
    left = [job for job in jobs if job.report is None]
    left.sort(key=lambda job: job.point.get("seed", 0))
    if told.dry_run:
        for job in jobs:
            print("to run   " if job in left else "finished ", job.name)
        print(f"{len(left)} of {len(jobs)} jobs to run")
        sys.exit(0)
    if left and not told.read:
        run_jobs(left, config.sweep.parallel_jobs)


def loss_of(report: Mapping[str, Any]) -> float:
    """Validation loss, nats per byte where the text is known, else per token."""
    per_byte = report["val_nats_per_byte"]
    return float(report["val_nats_per_token"] if per_byte is None else per_byte)


def losses(jobs: Sequence[Job], keys: Sequence[str]) -> dict[str, dict[Any, dict[int, float]]]:
    """Arm -> value of `keys` (one, or a tuple) -> seed -> validation loss, of finished jobs."""
    found: dict[str, dict[Any, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for job in jobs:
        if (report := job.report) is not None:
            value = tuple(job.point[key] for key in keys)
            at = value[0] if len(keys) == 1 else value
            found[job.arm][at][job.point.get("seed", 0)] = loss_of(report)
    return found


def mean_sem(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    sem = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), sem


def meta(command: str, jobs: Sequence[Job]) -> dict[str, Any]:
    """Where a result file comes from: the machines and versions are those of its runs."""
    reports = [report for job in jobs if (report := job.report) is not None]

    def of_runs(key: str, here: str) -> str:
        return "; ".join(sorted({report.get(key, here) for report in reports})) or here

    return {
        "command": command,
        "hardware": of_runs("hardware", hardware(pick_device("auto"))),
        "versions": {
            "torch": of_runs("torch", torch.__version__),
            "python": of_runs("python", platform.python_version()),
        },
        "date": date.today().isoformat(),
        "jobs": len(jobs),
        "finished": len(reports),
        "train_seconds": round(sum(report["train_seconds"] for report in reports), 1),
    }


def command_line(told: argparse.Namespace, name: str) -> str:
    """The command that makes a result file again, wherever the runs lie."""
    keys = ("sweep", "along", "rate")
    words = [f"--{key} {getattr(told, key)}" for key in keys if hasattr(told, key)]
    settings = [text for text in told.overrides if not text.startswith("output=")]
    return " ".join([f"python -m geon.studies.{name}", *words, *settings])


def save(out: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write <out>/results/<name>.json."""
    path = out / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write(path, content)
    print(f"wrote {path}")
    return path


def load(out: Path, name: str) -> dict[str, Any]:
    """Read a result file."""
    content: dict[str, Any] = json.loads((out / "results" / f"{name}.json").read_text())
    return content


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (heads, *rows))
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def show(
    out: Path,
    name: str,
    table: Callable[[Mapping[str, Any]], str],
    picture: Callable[[Mapping[str, Any]], Figure],
) -> None:
    """Print the table of a result file's arms, and draw its picture as <out>/<name>.png."""
    content = load(out, name)
    arms = {arm: found for arm, found in content.items() if arm not in ("meta", "verdict")}
    print(table(arms))
    picture(arms).savefig(out / f"{name}.png", dpi=110)
