"""The folder of a run: made only once everything has been checked, never overwritten."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
PLAN = "plan.json"
REPORT = "report.json"


def move_aside(folder: Path) -> Path | None:
    """Rename an existing run folder to the first free <name>~<k>; None when there is none."""
    if not folder.exists():
        return None
    k = 1
    while (aside := folder.with_name(f"{folder.name}~{k}")).exists():
        k += 1
    return folder.rename(aside)


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, of one kind or all."""
    path = folder / METRICS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if kind is None or row["kind"] == kind]


def drop_after(folder: Path, step: int) -> None:
    """Drop metrics of steps that a resumed run will take again."""
    rows = [row for row in read_metrics(folder) if row["step"] <= step]
    aside = folder / f"{METRICS}.writing"
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(folder / METRICS)
