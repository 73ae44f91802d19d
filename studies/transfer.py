"""Does a learning rate tuned on a narrow model serve a wide one? `make transfer`.

Runs sweep=width_lr (one job a width, rate and seed; finished ones are skipped), finds the best rate
of each width, and tells how far it moves and what the narrowest model's rate costs the widest.
Writes results/transfer.json and transfer.png.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from geon.launch.leave import guard
from geon.studies import shared as studies

Curve = Mapping[float, Mapping[int, float]]
"""Learning rate -> seed -> loss."""


def means(curve: Curve) -> dict[float, float]:
    """Mean loss of each rate that has every seed; others are gaps."""
    seeds = max((len(by_seed) for by_seed in curve.values()), default=0)
    return {
        lr: studies.mean_sem(list(by_seed.values()))[0]
        for lr, by_seed in sorted(curve.items())
        if len(by_seed) == seeds
    }


def best_lr(curve: Curve) -> tuple[float, bool]:
    """Rate of the least mean loss, and whether it lies inside the grid.

    Inside, it is the lowest point of the parabola in log2 lr through the three points around the
    least one; that point lies between them.
    """
    mean = means(curve)
    rates = list(mean)
    i = min(range(len(rates)), key=lambda k: mean[rates[k]])
    if not 0 < i < len(rates) - 1:
        return rates[i], False
    x = [math.log2(lr) for lr in rates[i - 1 : i + 2]]
    y = [mean[lr] for lr in rates[i - 1 : i + 2]]
    a, b, _ = np.polyfit(x, y, 2)
    return (2.0 ** float(-b / (2 * a)) if a > 0 else rates[i]), True


def regret(curve: Curve, transferred: float) -> tuple[float, float]:
    """Loss at the grid's rate nearest to `transferred` over the least, mean and SEM over seeds."""
    mean = means(curve)
    near = min(mean, key=lambda lr: abs(math.log2(lr / transferred)))
    best = min(mean, key=lambda lr: mean[lr])
    return studies.mean_sem([curve[near][seed] - curve[best][seed] for seed in curve[best]])


def verdict(widths: Mapping[int, Curve]) -> dict[str, Any]:
    """What the curves of one optimizer say.

    Returns:
        lr_star by width, spread in octaves, slope d log2 lr* / d log2 width, regret of the
        narrowest width's rate at the widest, its standard error, the least loss by width, curves.
    """
    narrow, wide = min(widths), max(widths)
    star = {width: best_lr(widths[width]) for width in sorted(widths)}
    logs = [math.log2(lr) for lr, _ in star.values()]
    slope = float(np.polyfit([math.log2(width) for width in star], logs, 1)[0])
    transferred = means(widths[narrow])
    lost, sem = regret(widths[wide], min(transferred, key=lambda lr: transferred[lr]))
    return {
        "lr_star": {str(width): lr for width, (lr, _) in star.items()},
        "lr_inside_grid": {str(width): inside for width, (_, inside) in star.items()},
        "spread_octaves": max(logs) - min(logs),
        "slope": slope,
        "regret": lost,
        "regret_sem": sem,
        "regret_allowed": max(0.01, 2 * sem),
        "best_loss": {str(w): min(means(widths[w]).values()) for w in sorted(widths)},
        "losses": {
            str(width): {
                f"{lr:g}": list(widths[width][lr].values()) for lr in sorted(widths[width])
            }
            for width in sorted(widths)
        },
    }


def picture(result: Mapping[str, Any]) -> Figure:
    """Loss against log2 lr, a curve a width, a panel an optimizer."""
    arms = list(result)
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axis, arm in zip(axes, arms, strict=False):
        for colour, (width, curve) in zip(
            studies.COLOURS, result[arm]["losses"].items(), strict=False
        ):
            x = [math.log2(float(lr)) for lr in curve]
            mean, sem = zip(*(studies.mean_sem(values) for values in curve.values()), strict=True)
            axis.errorbar(x, mean, sem, color=colour, label=width, capsize=2, lw=1.4)
            star = math.log2(result[arm]["lr_star"][width])
            axis.axvline(star, color=colour, lw=0.8, ls=":")
        axis.set_title(f"{arm}: {result[arm]['spread_octaves']:.1f} octaves", fontsize=10)
        axis.set_xlabel("log2 learning rate")
    for axis in list(figure.axes)[len(arms) :]:
        axis.remove()
    best = min(v for arm in arms for v in result[arm]["best_loss"].values())
    worst = max(v for arm in arms for v in result[arm]["best_loss"].values())
    figure.axes[0].set_ylim(best - 0.05, worst + 0.8)
    figure.axes[0].legend(title="width", fontsize=7)
    for axis in figure.axes[::columns]:
        axis.set_ylabel("validation, nats/byte")
    return figure


def table(result: Mapping[str, Any]) -> str:
    """One line an optimizer."""
    lines = [f"{'optimizer':<16} {'lr* by width':<42} {'octaves':>7} {'slope':>6} {'regret':>15}"]
    for arm, found in result.items():
        star = " ".join(
            f"{lr:.4g}{'' if found['lr_inside_grid'][w] else '(edge)'}"
            for w, lr in found["lr_star"].items()
        )
        lines.append(
            f"{arm:<16} {star:<42} {found['spread_octaves']:>7.2f} {found['slope']:>6.2f} "
            f"{found['regret']:>7.4f} +-{found['regret_sem']:.4f}"
        )
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> int:
    """Run the sweep and write its verdict."""
    parser = studies.parser(__doc__, "transfer")
    parser.add_argument("--sweep", default="width_lr", help="width_lr, or width_lr_gpu")
    told = parser.parse_intermixed_args(arguments)
    name = told.sweep.replace("width_lr", "transfer")
    if not told.draw:
        config, _, jobs = studies.jobs_of(told.sweep, told.overrides)
        studies.finish(jobs, told, config)
        found = studies.losses(jobs, ("model.d_model", "optim.lr"))
        result: dict[str, Any] = {
            "meta": studies.meta(studies.command_line(told, "transfer"), jobs)
        }
        for arm, points in found.items():
            widths: dict[int, dict[float, Mapping[int, float]]] = {}
            for (width, lr), by_seed in points.items():
                widths.setdefault(width, {})[lr] = by_seed
            result[arm] = verdict(widths)
        studies.save(told.out, name, result)
    studies.show(told.out, name, table, picture)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
