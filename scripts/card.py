"""Several seeds of one run together: their mean loss, and whether it is below a target.

python -m geon.scripts.card runs/muon-seed=0 runs/muon-seed=1 --target 3.28
python -m geon.scripts.card runs/muon-seed=* --step 3225 --json muon.json

The rule is that of modded-nanogpt's track 3: (target - mean) * sqrt(n) >= 0.004, for runs that were
not chosen by their loss, all looked at after the same step.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geon.configs.changes import MEASURED, PLACES, Kind, changes, flat
from geon.engine.callbacks import write_json
from geon.engine.card import CARD
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.scripts.flags import number, whole

MARGIN = 0.004
"""3.09 standard deviations of 0.0013, so p < 0.001: rule 3 of records/track_3_optimization in
KellerJordan/modded-nanogpt (2026-08-01)."""


def read(folder: Path) -> dict[str, Any]:
    """The card of a finished run.

    Raises:
        UsageError: there is none that can be read.
    """
    try:
        found = json.loads((folder / CARD).read_text())
    except OSError:
        raise UsageError(f"'{folder}' holds no {CARD}: give folders of finished runs") from None
    except ValueError as error:
        raise UsageError(f"'{folder / CARD}' cannot be read: {error}") from None
    return {**found, "folder": str(folder)}


def loss_at(card: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The row of a card's loss table after a step; 0 for the last.

    Raises:
        UsageError: it was not evaluated there.
    """
    if not step:
        step = card["steps"]
    row = next((row for row in card["losses"] if row["step"] == step), None)
    if row is None:
        known = ", ".join(str(row["step"]) for row in card["losses"][-8:])
        raise UsageError(
            f"--step {step}: '{card['folder']}' was evaluated after steps {known}, not after this"
        )
    return dict(row)


def check_alike(cards: Sequence[Mapping[str, Any]]) -> None:
    """Refuse runs whose mean would say nothing: of other settings or data, or the same one twice.

    Raises:
        UsageError: names two runs and what differs.
    """
    first = cards[0]
    for other in cards[1:]:
        for change in changes(flat(first["config"]), flat(other["config"])):
            free = change.kind is Kind.free and change.key not in MEASURED
            if free or change.key == "seed" or change.key in PLACES:
                continue
            raise UsageError(
                f"{change.where(repr(first['folder']))}, in '{other['folder']}': seeds of one "
                "experiment differ in seed alone"
            )
        if first["data"].get("sha256") != other["data"].get("sha256"):
            raise UsageError(
                f"'{first['folder']}' and '{other['folder']}' read other data "
                f"({first['data'].get('name')}, {other['data'].get('name')}: their sha256 differ)"
            )
    for i, one in enumerate(cards):
        for other in cards[:i]:
            if one["seed"] == other["seed"]:
                raise UsageError(
                    f"'{other['folder']}' and '{one['folder']}' have the same seed {one['seed']}, "
                    "so they are no two samples: give each run its own"
                )


def summary(cards: Sequence[Mapping[str, Any]], target: float, step: int = 0) -> dict[str, Any]:
    """n, mean, sd (None for one run) and the rule, with a row a run.

    Raises:
        UsageError: as `check_alike` and `loss_at` do.
    """
    check_alike(cards)
    rows = [loss_at(card, step) for card in cards]
    losses = [row["val_loss"] for row in rows]
    n, mean = len(losses), statistics.fmean(losses)
    evidence = (target - mean) * math.sqrt(n)
    facts = ("name", "seed", "run", "commits", "dirty", "hardware", "step_seconds")
    return {
        "format": 1,
        "step": rows[0]["step"],
        "tokens": rows[0]["tokens"],
        "n": n,
        "mean": mean,
        "sd": statistics.stdev(losses) if n > 1 else None,
        "target": target,
        "evidence": evidence,
        "needed": MARGIN,
        "holds": evidence >= MARGIN,
        "mean_needed": target - MARGIN / math.sqrt(n),
        "val_tokens": cards[0]["val_tokens"],
        "model": cards[0]["model"],
        "optim": cards[0]["optim"],
        "data": cards[0]["data"],
        "runs": [
            {key: card[key] for key in facts} | row for card, row in zip(cards, rows, strict=True)
        ],
    }


def page(found: Mapping[str, Any]) -> str:
    """The summary in Markdown."""
    spread = "" if found["sd"] is None else f", sd {found['sd']:.5f}"
    sign, word = (">=", "holds") if found["holds"] else ("<", "does not hold")
    rows = [
        f"| {run['name']} | {run['seed']} | {run['val_loss']:.5f} | {run['seconds']:.1f} | "
        f"{_ms(run['step_seconds'])} | {_commit(run)} |"
        for run in found["runs"]
    ]
    return "\n".join(
        [
            f"{found['optim']}, {found['model']['parameters']:,} parameters, "
            f"{found['data'].get('name')}: {found['step']:,} steps, {found['tokens']:,} tokens",
            "",
            *("| run | seed | validation loss | seconds | ms per step | commit |",),
            "|---|---:|---:|---:|---:|---|",
            *rows,
            "",
            f"n {found['n']}, mean {found['mean']:.5f}{spread}",
            "",
            f"({found['target']:g} - {found['mean']:.5f}) * sqrt({found['n']}) = "
            f"{found['evidence']:.5f} {sign} {found['needed']}: the rule {word} "
            f"(it needs a mean of {found['mean_needed']:.5f} or less)",
        ]
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _commit(run: Mapping[str, Any]) -> str:
    return ", ".join(commit[:10] for commit in run["commits"]) + ("+" if run["dirty"] else "")


def run(arguments: Sequence[str] | None) -> int:
    """Print the summary; write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.scripts.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one a seed")
    parser.add_argument("--target", type=number(), default=3.28, help="nats/token (3.28)")
    parser.add_argument("--step", type=whole(), default=0, help="step of all runs (their last)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    told = parser.parse_args(arguments)
    found = summary([read(folder) for folder in told.runs], told.target, told.step)
    print(page(found))
    if told.json:
        write_json(told.json, found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
