"""Runs beside each other: loss against steps, tokens and seconds, and when each got to a target.

python -m geon.scripts.race runs/muon runs/hybrid --target 3.28 --published track3
python -m geon.scripts.race runs/adamw runs/hybrid --target-of adamw --out docs --name race

Reads metrics.jsonl, so runs that still go on can be looked at. A target is reached at the first
evaluation that is not above it; seconds are of training, evaluations left out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from geon.engine.callbacks import write_json
from geon.engine.card import losses
from geon.engine.runfolder import read_metrics, read_report
from geon.errors import UsageError, nearest
from geon.launch.leave import guard
from geon.scripts.flags import number
from geon.studies.shared import COLOURS

PUBLISHED = Path(__file__).parent / "published"
"""Curves of others, a file a track; each names its source."""

AXES = {"step": "steps", "tokens": "tokens, millions", "seconds": "seconds of training"}


def read(folder: Path) -> dict[str, Any]:
    """Curve of a run, and the data that its losses are of.

    Raises:
        UsageError: it has not been evaluated, or is no run.
    """
    points = losses(folder)
    starts = read_metrics(folder, "start")
    if not points or not starts:
        raise UsageError(
            f"'{folder}' has no evaluations in metrics.jsonl: give run folders, and set eval.every"
        )
    last = read_metrics(folder, "eval")[-1]
    return {
        "points": points,
        "data": starts[-1]["data"].get("sha256"),
        "val_tokens": last["val_tokens"],
        "finished": read_report(folder) is not None,
    }


def race(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Curves by the names of their folders.

    Raises:
        UsageError: one name twice, or losses of other tokens.
    """
    runs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in runs:
            raise UsageError(f"two runs are named '{name}': the table could not tell them apart")
        runs[name] = read(folder)
    first, *others = runs.items()
    for name, found in others:
        for key, told in (("data", "data of another sha256"), ("val_tokens", "other tokens")):
            if found[key] != first[1][key]:
                raise UsageError(
                    f"'{first[0]}' and '{name}' are evaluated on {told} "
                    f"({first[1][key]} and {found[key]}): their losses are not comparable"
                )
    return runs


def reached(points: Sequence[Mapping[str, Any]], target: float) -> dict[str, Any] | None:
    """The first point whose loss is not above the target; None where there is none."""
    return next((dict(point) for point in points if point["val_loss"] <= target), None)


def published(track: str) -> dict[str, dict[str, Any]]:
    """Others' curves of a track; they have no seconds.

    Raises:
        UsageError: no such track; names the nearest.
    """
    file = PUBLISHED / f"{track}.json"
    if not file.is_file():
        known = sorted(path.stem for path in PUBLISHED.glob("*.json"))
        raise UsageError(
            f"--published {track}: there is {', '.join(known)}.{nearest(track, known)}"
        )
    content = json.loads(file.read_text())
    return {
        f"record {name}": {
            "points": [
                {"step": step, "tokens": step * content["batch_tokens"], "val_loss": loss}
                for step, loss in record["points"]
            ],
            "source": content["source"],
            "log": record["log"],
        }
        for name, record in content["records"].items()
    }


def verdict(runs: Mapping[str, Mapping[str, Any]], target: float) -> dict[str, Any]:
    """By run: its last point, and the point at which it got to the target, or None."""
    return {
        "target": target,
        "runs": {
            name: {
                "last": found["points"][-1],
                "reached": reached(found["points"], target),
                "points": found["points"],
                **{key: found[key] for key in ("finished", "log", "source") if key in found},
            }
            for name, found in runs.items()
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row a run, the earliest to the target first."""
    runs = found["runs"]

    def key(name: str) -> tuple[float, float]:
        at = runs[name]["reached"]
        return (at["tokens"] if at else float("inf"), runs[name]["last"]["val_loss"])

    lines = [
        f"| run | loss at its end | step of {found['target']:.4f} | tokens | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in sorted(runs, key=key):
        at, last = runs[name]["reached"], runs[name]["last"]
        going = "" if runs[name].get("finished", True) else f" (at step {last['step']:,})"
        cells = [f"{name}{going}", f"{last['val_loss']:.4f}"]
        cells += [f"{at['step']:,}", f"{at['tokens']:,}"] if at else ["not reached", ""]
        cells.append(f"{at['seconds']:.1f}" if at and "seconds" in at else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Mapping[str, Any]) -> Figure:
    """Loss against steps, tokens and seconds, with the target as a line."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    every = zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True)
    for axes, (along, label) in every:
        for i, (name, run) in enumerate(found["runs"].items()):
            points = [point for point in run["points"] if along in point]
            style = {"ls": "--", "lw": 1.0} if "source" in run else {"marker": "o", "ms": 2.5}
            axes.plot(
                [point[along] / (1e6 if along == "tokens" else 1) for point in points],
                [point["val_loss"] for point in points],
                color=COLOURS[i % len(COLOURS)],
                label=name,
                **style,
            )
        axes.axhline(found["target"], color="#9ca3af", lw=0.8)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation, nats/token")
    ends = [run["last"]["val_loss"] for run in found["runs"].values()]
    top = max(run["points"][0]["val_loss"] for run in found["runs"].values())
    low = min(*ends, found["target"])
    figure.axes[0].set_ylim(low - 0.05 * (top - low), low + 0.6 * (top - low))
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def run(arguments: Sequence[str] | None) -> int:
    """Print the table; draw and write where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.scripts.race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--target", type=number(), help="loss to reach, nats/token")
    aim.add_argument("--target-of", help="name of one of the runs: its loss at its end")
    parser.add_argument("--published", default="", help="others' curves besides: track3")
    parser.add_argument("--out", type=Path, help="folder for <name>.png and <name>.json")
    parser.add_argument("--name", default="race", help="of those files (race)")
    told = parser.parse_args(arguments)
    runs = race(told.runs)
    if told.target_of is not None and told.target_of not in runs:
        hint = nearest(told.target_of, list(runs))
        raise UsageError(f"--target-of {told.target_of}: the runs are {', '.join(runs)}.{hint}")
    target = told.target or runs[told.target_of]["points"][-1]["val_loss"]
    if told.published:
        runs |= published(told.published)
    found = verdict(runs, target)
    print(table(found))
    if told.out:
        told.out.mkdir(parents=True, exist_ok=True)
        write_json(told.out / f"{told.name}.json", found)
        picture(found).savefig(told.out / f"{told.name}.png", dpi=110)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
