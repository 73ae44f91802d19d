"""Does the geometry pay? Equal searches on a part of the tokens, the best settings at full length.

python -m geon.studies.evidence                          # 2 cores, hours, resumable
python -m geon.studies.evidence --sweep evidence_124m    # one GPU
python -m geon.studies.evidence --read                   # the table of what has finished

Every arm of the sweep is given as many short runs as the others, under one seed: its grid of
rates, at the grid's schedule.steps; at the best of them the rates of embedding and head halved and
doubled; at the best of these no weight decay and three times it, or half and twice the radius where
there is none. What is best runs at the schedule.steps of the sweep's overrides, at its rate and
at half of it (longer runs want smaller ones), and the better of the two with two more seeds.
Writes results/<sweep>.json and <sweep>.png after every arm.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.figure import Figure

from geon.configs.choices import RuleKind
from geon.configs.schema import Config
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.launch.sweep import Job, make_job
from geon.studies import shared as studies
from geon.studies.leaderboard import best, by_arm, curve, tokens_to

LR = "optim.lr"
STEPS = "schedule.steps"
MORE_SEEDS = (1, 2)
"""Besides the search's."""
YARDSTICK = "adamw"
"""Arm whose final loss the others' curves are held against."""
RIVALS = ("muon", "normuon")
"""Arms that every arm is held against, seed by seed."""


Found = tuple[list[Job], dict[str, Any] | None]
"""Jobs of an arm, and its line of the table once a run at full length has finished."""


def ends(job: Job) -> list[dict[str, Any]]:
    """Tries around a point: the rates of embedding and head halved, and doubled."""
    optim = compose(job.arguments).optim
    scales = {name: getattr(optim, name).lr_scale for name in ("embedding", "head")}
    return [
        {f"optim.{name}.lr_scale": scale * factor for name, scale in scales.items()}
        for factor in (0.5, 2.0)
    ]


def decay(job: Job) -> list[dict[str, Any]]:
    """Tries around a point: no weight decay and three times it; without any, another size."""
    hidden = compose(job.arguments).optim.hidden
    if hidden.weight_decay:
        key, tries = "optim.hidden.weight_decay", (0.0, 3.0 * hidden.weight_decay)
    elif hidden.rule is RuleKind.steepest:
        key, tries = "optim.hidden.radius", (0.5 * hidden.radius, 2.0 * hidden.radius)
    else:
        key, tries = LR, (0.7 * job.point[LR], 1.4 * job.point[LR])
    return [{key: value} for value in tries]


class Study:
    """A sweep whose jobs are made as results come in."""

    def __init__(self, sweep: str, overrides: Sequence[str]) -> None:
        self.config: Config
        self.config, self.told, jobs = studies.jobs_of(sweep, overrides)
        self.arms = by_arm(jobs)
        self.steps = compose(self.job(jobs[0].arm, {}).arguments).schedule.steps

    def arm(self, arm: str, told: argparse.Namespace) -> "Found":
        """An arm's jobs and line, run as far as `told` says; later jobs follow from results."""
        searched = list(self.arms[arm])
        studies.finish(searched, told, self.config)
        chosen = best(searched)
        if chosen is None:
            return searched, None
        for tries in (ends, decay):
            more = [self.job(arm, {**chosen.point, **one}) for one in tries(chosen)]
            studies.finish(more, told, self.config)
            searched += more
            chosen = best(searched) or chosen
        at = {**chosen.point, STEPS: self.steps}
        pair = [self.job(arm, {**at, LR: at[LR] * factor}) for factor in (1.0, 0.5)]
        studies.finish(pair, told, self.config)
        first = best(pair) or pair[0]
        runs = [first, *(self.job(arm, {**first.point, "seed": seed}) for seed in MORE_SEEDS)]
        studies.finish(runs, told, self.config)
        jobs = [*searched, *pair, *runs[1:]]
        done = any(job.report is not None for job in runs)
        return jobs, row(searched, pair, runs) if done else None

    def job(self, arm: str, point: Mapping[str, Any]) -> Job:
        """Job of an arm at a point."""
        return make_job(self.config, self.told, arm, point)


def row(searched: Sequence[Job], pair: Sequence[Job], runs: Sequence[Job]) -> dict[str, Any]:
    """One arm's line: what it was searched with, and what its runs at full length gave."""
    chosen = best(searched) or searched[0]
    point = runs[0].point
    done = [(job, report) for job in runs if (report := job.report) is not None]
    losses = {job.point["seed"]: studies.loss_of(report) for job, report in done}
    loss, sem = studies.mean_sem(list(losses.values()))
    rates = sorted(job.point[LR] for job in searched)
    curves = [curve(job) for job, _ in done]
    report = done[0][1]
    return {
        "loss": loss,
        "sem": sem,
        "seeds": len(done),
        "losses": losses,
        "runs_searched": sum(job.report is not None for job in (*searched, pair[1])),
        "lr": point[LR],
        "lr_of_search": chosen.point[LR],
        "lr_inside_grid": rates[0] < chosen.point[LR] < rates[-1],
        "by_lr": {f"{j.point[LR]:g}": studies.loss_of(j.report) for j in pair if j.report},
        "settings": {k: v for k, v in point.items() if k not in (LR, STEPS, "seed")},
        "search_loss": studies.loss_of(chosen.report) if chosen.report else None,
        "state_bytes_per_param": report["optimizer_state_bytes"] / report["parameters"],
        "step_share": median(report["optimizer_share"] for _, report in done),
        "parameters": report["parameters"],
        "tokens": report["tokens"],
        "curve": [
            [points[0][0], fmean(loss for _, loss in points)]
            for points in zip(*curves, strict=False)
        ],
    }


def compared(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows with the yardstick's tokens and the distances to rivals, the best first."""
    target = rows.get(YARDSTICK, {}).get("loss")
    for found in rows.values():
        reached = tokens_to(found["curve"], target) if target is not None else None
        found["tokens_to_adamw"] = None if reached is None else reached / found["tokens"]
        for rival in RIVALS:
            if rival in rows:
                other = rows[rival]["losses"]
                seeds = found["losses"].keys() & other.keys()
                apart = [found["losses"][seed] - other[seed] for seed in seeds]
                found[f"minus_{rival}"] = studies.mean_sem(apart) if apart else None
    return dict(sorted(rows.items(), key=lambda item: item[1]["loss"]))


def write(told: argparse.Namespace, found: Mapping[str, Found]) -> None:
    """Write the result file of all arms of which a run at full length has finished."""
    rows = {arm: line for arm, (_, line) in found.items() if line is not None}
    first = next(iter(rows.values()), {})
    jobs = [job for some, _ in found.values() for job in some]
    facts = studies.meta(studies.command_line(told, "evidence"), jobs)
    sizes = {key: first.get(key) for key in ("parameters", "tokens")}
    studies.save(told.out, told.sweep, {**sizes, "optimizers": compared(rows), "meta": facts})


def table(found: Mapping[str, Any]) -> str:
    """The arms as markdown, the best first."""
    heads = ["optimizer", "loss, nats/byte", *(f"minus {rival}" for rival in RIVALS)]
    heads += ["tokens to adamw's", "state, B/param", "of step time", "runs", "lr", "settings"]
    lines = []
    for name, row in found["optimizers"].items():
        apart = [row.get(f"minus_{rival}") for rival in RIVALS]
        reached = row["tokens_to_adamw"]
        one_seed = row["seeds"] == 1  # has no standard error
        cells = [
            name,
            f"{row['loss']:.4f}" + ("" if one_seed else f" ± {row['sem']:.4f}"),
            *(
                "" if one is None else f"{one[0]:+.4f}" + ("" if one_seed else f" ± {one[1]:.4f}")
                for one in apart
            ),
            f"{reached:.2f}" if reached else "not reached",
            f"{row['state_bytes_per_param']:.2f}",
            f"{row['step_share']:.0%}",
            f"{row['runs_searched']} + {row['seeds']}",
            f"{row['lr']:g}{'' if row['lr_inside_grid'] else ' (edge)'}",
            ", ".join(f"{k.removeprefix('optim.')} {v:g}" for k, v in row["settings"].items()),
        ]
        lines.append(cells)
    return studies.markdown(heads, lines)


def picture(found: Mapping[str, Any]) -> Figure:
    """Final losses as bars, and the curves of the best beside the yardstick's."""
    rows = found["optimizers"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for name in list(rows)[::-1]:
        colour = studies.COLOURS[0] if name.startswith("hybrid") else "#9ca3af"
        bars.barh(name, rows[name]["loss"], xerr=rows[name]["sem"], color=colour)
    losses = [row["loss"] for row in rows.values()]
    bars.set_xlim(min(losses) - 0.05, min(max(losses), min(losses) + 0.6) + 0.05)
    bars.set_xlabel("validation, nats/byte")
    shown = [*list(rows)[:6], *(name for name in (YARDSTICK,) if name in list(rows)[6:])]
    for colour, name in zip(studies.COLOURS, shown, strict=False):
        tokens, loss = zip(*rows[name]["curve"], strict=True)
        curves.plot(tokens, loss, color=colour, label=name)
    curves.set_ylim(min(losses) - 0.05, min(losses) + 0.6)
    curves.set_xlabel("tokens")
    curves.legend(fontsize=8)
    return figure


def run(arguments: Sequence[str]) -> int:
    """Search, confirm, and write the table."""
    parser = studies.parser(__doc__, "evidence")
    parser.add_argument("--sweep", default="evidence", help="a sweep with arms")
    parser.add_argument("--arms", default="", help="only these, with commas between (all)")
    told = parser.parse_intermixed_args(arguments)
    if not told.draw:
        study = Study(told.sweep, told.overrides)
        if told.dry_run:
            jobs = [job for some in study.arms.values() for job in some]
            studies.finish(jobs, told, study.config)
        only = [arm for arm in told.arms.split(",") if arm]
        if unknown := [arm for arm in only if arm not in study.arms]:
            raise UsageError(f"--arms {unknown[0]}: sweep={told.sweep} has {', '.join(study.arms)}")
        reading = argparse.Namespace(**(vars(told) | {"read": True, "dry_run": False}))
        found = {arm: study.arm(arm, reading) for arm in study.arms}
        for arm in () if told.read else only or study.arms:
            found[arm] = study.arm(arm, told)
            write(told, found)
        write(told, found)
    content = studies.load(told.out, told.sweep)
    print(table(content))
    picture(content).savefig(told.out / f"{told.sweep}.png", dpi=110)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
