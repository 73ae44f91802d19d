"""The folder of a run: made only once everything has been checked, never overwritten."""

import json
import math
from pathlib import Path
from typing import Any

from geon.configs.choices import Outcome
from geon.engine.history import read_rows

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
PLAN = "plan.json"
REPORT = "report.json"
OVERRIDES = "overrides.txt"


def move_aside(folder: Path) -> Path | None:
    """Rename an existing run folder to the first free <name>~<k>; None when there is none."""
    if not folder.exists():
        return None
    k = 1
    while (aside := folder.with_name(f"{folder.name}~{k}")).exists():
        k += 1
    return folder.rename(aside)


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one kind or all; a damaged one is left out, and that is said."""
    rows = read_rows(folder / METRICS)
    return [row for row in rows if kind is None or row["kind"] == kind]


def objective(folder: Path, which: Outcome) -> float:
    """What a sweeper minimises: the last validation loss in the log of a run, or the best.

    Returns: nats a byte where they are known, else a token; nan without an evaluation.
    """
    rows = sorted(read_metrics(folder, "eval"), key=lambda row: row["step"])
    of_bytes = [row.get("val_nats_per_byte") for row in rows]
    of_tokens = [row.get("val_nats_per_token") for row in rows]
    pairs = zip(of_bytes, of_tokens, strict=True)
    found = [b if b is not None else t for b, t in pairs if b is not None or t is not None]
    if not found:
        return math.nan
    return float(found[-1] if which is Outcome.last else min(found))


def drop_after(folder: Path, step: int, branch: Path | None = None) -> None:
    """Drop metrics of steps that a resumed run will take again.

    branch: where they are kept, if they led somewhere.
    """
    rows = read_metrics(folder)
    if branch is not None:
        _write_rows(branch / METRICS, [row for row in rows if row["step"] > step])
    _write_rows(folder / METRICS, [row for row in rows if row["step"] <= step])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)


def report_aside(folder: Path) -> None:
    """Rename the report of what the folder goes on from, or goes back behind; none is replaced."""
    if (found := read_report(folder)) is None:
        return
    name, k = f"report-{int(found.get('steps', 0)):07d}", 0
    while (aside := folder / f"{name}{f'~{k}' if k else ''}.json").exists():
        k += 1
    (folder / REPORT).rename(aside)


def read_report(folder: Path) -> dict[str, Any] | None:
    """What report.json holds; None where there is none that can be read."""
    try:
        found = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
