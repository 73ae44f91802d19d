"""All optimizers on the same model, tokens and order of data: `make leaderboard`.

Every arm of sweep=leaderboard searches as many learning rates as the others with one seed; its best
one runs again with more seeds. Finished jobs are skipped, so the same command resumes. Writes
results/<sweep>.json and <sweep>.png.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from geon.configs.schema import Config
from geon.engine.runfolder import read_metrics
from geon.launch.leave import guard
from geon.launch.sweep import Job, make_job
from geon.studies import shared as studies

LR = "optim.lr"
SEEDS = (1, 2)
"""Besides the search's."""
YARDSTICKS = ("adamw", "adamw_rates")
"""Arms whose final losses the others' curves are held against: with one rate, and one a role."""


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Jobs by their arm, in order."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.arm, []).append(job)
    return found


def best(search: Sequence[Job]) -> Job | None:
    """The finished job of the least loss; None when there is none."""
    done = [(studies.loss_of(job.report), i) for i, job in enumerate(search) if job.report]
    return search[min(done)[1]] if done else None


def repeats(search: Sequence[Job], config: Config, overrides: Sequence[str]) -> list[Job]:
    """Jobs of the best rate of each arm with more seeds."""
    return [
        make_job(config, overrides, arm, {**chosen.point, "seed": seed})
        for arm, jobs in by_arm(search).items()
        if (chosen := best(jobs)) is not None
        for seed in SEEDS
    ]


def curve(job: Job) -> list[tuple[float, float]]:
    """(tokens, validation loss) along a run."""
    return [
        (float(row["tokens"]), studies.loss_of(row)) for row in read_metrics(job.folder, "eval")
    ]


def tokens_to(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Tokens at which a curve first comes down to `target`, between its points by a straight line.

    None when it never does.
    """
    last: tuple[float, float] | None = None
    for tokens, loss in points:
        if loss <= target:
            if last is None:
                return tokens
            share = (last[1] - target) / (last[1] - loss)
            return last[0] + share * (tokens - last[0])
        last = (tokens, loss)
    return None


def row(search: Sequence[Job], more: Sequence[Job], targets: Mapping[str, float]) -> dict[str, Any]:
    """One line of the table; docs/results.md says what its columns mean."""
    chosen = best(search)
    assert chosen is not None and chosen.report is not None
    runs = [job for job in (chosen, *more) if job.report is not None]
    reports = [job.report for job in runs if job.report is not None]
    loss, sem = studies.mean_sem([studies.loss_of(report) for report in reports])
    rates = sorted(job.point[LR] for job in search)
    curves = [curve(job) for job in runs]
    return {
        "loss": loss,
        "sem": sem,
        "seeds": len(runs),
        "losses": [studies.loss_of(report) for report in reports],
        "lr": chosen.point[LR],
        "lr_inside_grid": rates[0] < chosen.point[LR] < rates[-1],
        "search": {
            f"{job.point[LR]:g}": studies.loss_of(job.report) if job.report else None
            for job in search
        },
        "tokens": reports[0]["tokens"],
        **{f"tokens_to_{arm}": _mean_tokens(curves, targets.get(arm)) for arm in YARDSTICKS},
        "state_bytes_per_param": reports[0]["optimizer_state_bytes"] / reports[0]["parameters"],
        "step_share": median(report["optimizer_share"] for report in reports),
        "curve": [[t, fmean(v)] for t, v in _mean_curve(curves)],
    }


def _mean_tokens(
    curves: Sequence[Sequence[tuple[float, float]]], target: float | None
) -> float | None:
    """Mean of `tokens_to` over seeds; None unless every seed reaches it."""
    reached = [tokens_to(points, target) for points in curves if target is not None]
    known = [tokens for tokens in reached if tokens is not None]
    return fmean(known) if known and len(known) == len(reached) else None


def _mean_curve(
    curves: Sequence[Sequence[tuple[float, float]]],
) -> list[tuple[float, list[float]]]:
    """Points of several runs at the same tokens."""
    return [(points[0][0], [loss for _, loss in points]) for points in zip(*curves, strict=False)]


def verdict(search: Sequence[Job], more: Sequence[Job]) -> dict[str, Any]:
    """Every arm's row, the best first."""
    searches, others = by_arm(search), by_arm(more)
    searches = {arm: jobs for arm, jobs in searches.items() if best(jobs) is not None}
    targets = {
        arm: row(searches[arm], others.get(arm, ()), {})["loss"]
        for arm in YARDSTICKS
        if arm in searches
    }
    rows = {arm: row(jobs, others.get(arm, ()), targets) for arm, jobs in searches.items()}
    return dict(sorted(rows.items(), key=lambda item: item[1]["loss"]))


def table(rows: Mapping[str, Any]) -> str:
    """The leaderboard as markdown."""
    held_against = [arm for arm in YARDSTICKS if arm in rows]
    heads = ["optimizer", "loss, nats/byte", *(f"tokens to {arm}'s" for arm in held_against)]
    heads += ["state, B/param", "of step time", "lr"]
    lines = []
    for name, found in rows.items():
        reached = [(found[f"tokens_to_{arm}"], rows[arm]["tokens"]) for arm in held_against]
        edge = "" if found["lr_inside_grid"] else " (edge)"
        cells = [
            name,
            f"{found['loss']:.4f} ± {found['sem']:.4f}",
            *(f"{tokens / all_:.2f}" if tokens else "not reached" for tokens, all_ in reached),
            f"{found['state_bytes_per_param']:.2f}",
            f"{found['step_share']:.0%}",
            f"{found['lr']:g}{edge}",
        ]
        lines.append(cells)
    return studies.markdown(heads, lines)


def picture(rows: Mapping[str, Any]) -> Figure:
    """Final losses as bars, and the curves of the best ones beside AdamW's."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    names = list(rows)[::-1]
    for name in names:
        found = rows[name]
        colour = studies.COLOURS[0] if "hybrid" in name else "#9ca3af"
        bars.barh(name, found["loss"], xerr=found["sem"], color=colour)
    least = min(found["loss"] for found in rows.values())
    most = max(found["loss"] for found in rows.values() if math.isfinite(found["loss"]))
    bars.set_xlim(least - 0.1, min(most + 0.05, least + 1.2))
    bars.set_xlabel("validation, nats/byte")
    bars.tick_params(axis="y", labelsize=8)
    shown = [name for name in rows if "half" not in name][:6]
    shown += [name for name in YARDSTICKS if name in rows and name not in shown]
    for colour, name in zip(studies.COLOURS, shown, strict=False):
        tokens, loss = zip(*rows[name]["curve"], strict=True)
        curves.plot(tokens, loss, color=colour, label=name)
    curves.set_ylim(least - 0.05, least + 1.0)
    curves.set_xlabel("tokens")
    curves.legend(fontsize=8)
    return figure


def run(arguments: Sequence[str]) -> int:
    """Search, repeat, and write the table."""
    parser = studies.parser(__doc__, "leaderboard")
    parser.add_argument("--sweep", default="leaderboard", help="a sweep with arms, e.g. recipe")
    told = parser.parse_intermixed_args(arguments)
    if not told.draw:
        config, overrides, search = studies.jobs_of(told.sweep, told.overrides)
        studies.finish(search, told, config)
        more = repeats(search, config, overrides)
        studies.finish(more, told, config)
        facts = studies.meta(studies.command_line(told, "leaderboard"), [*search, *more])
        studies.save(told.out, told.sweep, {"meta": facts, **verdict(search, more)})
    studies.show(told.out, told.sweep, table, picture)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
