"""Arms of a sweep at their best rates, along one key of its grid: batch size, length, or none.

python -m geon.studies.compare batch --along data.batch_tokens
python -m geon.studies.compare rates --along optim.embedding.lr --rate optim.head.lr
python -m geon.studies.compare first_run_sweep

Runs what has not finished, takes for each arm and value the rate of the least mean loss over seeds,
and writes results/<sweep>.json and <sweep>.png.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from geon.launch.leave import guard
from geon.launch.sweep import Job
from geon.studies import shared as studies

LR = "optim.lr"


def verdict(jobs: Sequence[Job], along: str, rate: str = LR) -> dict[str, Any]:
    """Arm -> value of `along` ("" without one) -> loss, sem, seeds, lr, lr_inside_grid, by_lr."""
    keys = (along, rate) if along else (rate,)
    result: dict[str, Any] = {}
    for arm, points in studies.losses(jobs, keys).items():
        curves: dict[str, dict[float, Mapping[int, float]]] = {}
        for point, by_seed in points.items():
            value, lr = point if along else ("", point)
            curves.setdefault(str(value), {})[lr] = by_seed
        result[arm] = {value: _best(curve) for value, curve in curves.items()}
    return result


def _best(curve: Mapping[float, Mapping[int, float]]) -> dict[str, Any]:
    means = {lr: studies.mean_sem(list(by_seed.values())) for lr, by_seed in curve.items()}
    most = max(len(by_seed) for by_seed in curve.values())
    whole = [lr for lr, by_seed in curve.items() if len(by_seed) == most]
    lr = min(whole, key=lambda rate: means[rate])
    return {
        "loss": means[lr][0],
        "sem": means[lr][1],
        "seeds": most,
        "lr": lr,
        "lr_inside_grid": min(curve) < lr < max(curve),
        "by_lr": {f"{rate:g}": list(curve[rate].values()) for rate in sorted(curve)},
    }


def table(arms: Mapping[str, Any]) -> str:
    """Markdown: a row an arm, a column a value."""
    values = list(dict.fromkeys(value for found in arms.values() for value in found))
    head = " | ".join(value or "loss, nats/byte" for value in values)
    lines = [f"| | {head} |", "|---" * (1 + len(values)) + "|"]
    order = sorted(arms, key=lambda arm: arms[arm].get(values[-1], {}).get("loss", math.inf))
    for arm in order:
        cells = []
        for value in values:
            if (found := arms[arm].get(value)) is None:
                cells.append("")
                continue
            edge = "" if found["lr_inside_grid"] or len(found["by_lr"]) == 1 else "*"
            cells.append(f"{found['loss']:.4f} ± {found['sem']:.4f} at {found['lr']:g}{edge}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "\\* best rate at the edge of the grid"])


def picture(arms: Mapping[str, Any], along: str) -> Figure:
    """Loss along the key, an arm a curve; bars without a key."""
    if not along:
        figure = Figure(figsize=(8, 0.26 * len(arms) + 1), layout="constrained")
        axis = figure.subplots()
        order = sorted(arms, key=lambda arm: -arms[arm][""]["loss"])
        losses = [arms[arm][""]["loss"] for arm in order]
        axis.barh(order, losses, xerr=[arms[arm][""]["sem"] for arm in order], color="#2563eb")
        axis.set_xlim(min(losses) - 0.03, max(losses) + 0.02)
        axis.tick_params(axis="y", labelsize=8)
        axis.set_xlabel("validation, nats/byte")
        return figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for i, (arm, found) in enumerate(arms.items()):
        x = [float(value) for value in found]
        loss = [point["loss"] for point in found.values()]
        sem = [point["sem"] for point in found.values()]
        colour = studies.COLOURS[i % len(studies.COLOURS)]
        axis.errorbar(x, loss, sem, marker="o", ms=4, capsize=2, color=colour, label=arm)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(along)
    axis.set_ylabel("validation, nats/byte")
    axis.legend(fontsize=8)
    return figure


def run(arguments: Sequence[str]) -> int:
    """Run the sweep and write what it says."""
    parser = studies.parser(__doc__, "compare")
    parser.add_argument(
        "--along", default=argparse.SUPPRESS, help="key of the grid to compare along"
    )
    parser.add_argument(
        "--rate", default=argparse.SUPPRESS, help=f"key of the grid to choose the best of ({LR})"
    )
    told = parser.parse_intermixed_args(arguments)
    sweep, *told.overrides = told.overrides or ["none"]
    along, rate = getattr(told, "along", ""), getattr(told, "rate", LR)
    if not told.draw:
        config, _, jobs = studies.jobs_of(sweep, told.overrides)
        studies.finish(jobs, told, config)
        facts = studies.meta(studies.command_line(told, f"compare {sweep}"), jobs)
        studies.save(told.out, sweep, {"meta": facts, **verdict(jobs, along, rate)})
    studies.show(told.out, sweep, table, lambda arms: picture(arms, along))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
