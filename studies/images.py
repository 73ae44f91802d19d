"""Manifold Muon against tuned AdamW, Muon and SGD on images: the published MLP experiment.

Every arm of sweep=images searches as many settings as the others with one seed; the one of the best
test accuracy runs again with four more. Finished jobs are skipped, so the same command resumes.
Writes results/images.json and images.png.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from geon.configs.schema import Config
from geon.engine import checkpoint
from geon.engine.main import execute
from geon.engine.runfolder import read_metrics
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import guard
from geon.launch.sweep import Job, make_job
from geon.studies import shared as studies
from geon.studies.leaderboard import by_arm

SEEDS = (1, 2, 3, 4)
"""Besides the search's."""
LR, DECAY = "optim.lr", "optim.hidden.weight_decay"


def best(search: Sequence[Job]) -> Job | None:
    """The finished job of the highest accuracy; None when there is none."""
    done = [(job.report["val_accuracy"], -i) for i, job in enumerate(search) if job.report]
    return search[-max(done)[1]] if done else None


def repeats(search: Sequence[Job], config: Config, overrides: Sequence[str]) -> list[Job]:
    """Jobs of the best setting of each arm with more seeds."""
    return [
        make_job(config, overrides, arm, {**chosen.point, "seed": seed})
        for arm, jobs in by_arm(search).items()
        if (chosen := best(jobs)) is not None
        for seed in SEEDS
    ]


def finish(jobs: Sequence[Job], told: Namespace) -> None:
    """Run the jobs that have not finished, one after the other, in this process.

    A job takes seconds, and a process of its own would take as long to start.
    """
    left = [job for job in jobs if job.report is None]
    if told.dry_run:
        print(f"{len(left)} of {len(jobs)} jobs to run")
        sys.exit(0)
    for job in [] if told.read else left:
        if job.report is not None:  # another process has run it meanwhile
            continue
        print(f"running {job.name}", flush=True)
        try:
            execute(compose(job.arguments), Env())
        except FloatingPointError as error:  # it diverged: a gap in the table
            print(f"{job.name}: {error}", flush=True)


def spectra(job: Job) -> dict[str, list[float]]:
    """Singular values of each trained matrix, the largest first."""
    found, facts, _ = checkpoint.newest_sound(job.folder, fall_back=False)
    assert found is not None
    model = checkpoint.model_of(found, facts)
    model.to_empty(device="cpu")
    checkpoint.load_weights(found, model)
    with torch.no_grad():
        return {name: torch.linalg.svdvals(w).tolist() for name, w in model.named_parameters()}


def row(search: Sequence[Job], more: Sequence[Job]) -> dict[str, Any]:
    """One line of the table."""
    chosen = best(search)
    assert chosen is not None
    runs = [job for job in (chosen, *more) if job.report is not None]
    reports = [job.report for job in runs if job.report is not None]
    right = [report["val_accuracy"] for report in reports]
    accuracy, sem = studies.mean_sem(right)
    loss, loss_sem = studies.mean_sem([report["val_nats_per_token"] for report in reports])
    rates = sorted({job.point[LR] for job in search})
    train = read_metrics(chosen.folder, "train")
    return {
        "accuracy": accuracy,
        "sem": sem,
        "accuracies": right,
        "loss": loss,
        "loss_sem": loss_sem,
        "train_loss": train[-1]["loss"],
        "lr": chosen.point[LR],
        "weight_decay": chosen.point[DECAY],
        "lr_inside_grid": rates[0] < chosen.point[LR] < rates[-1],
        "search": [
            {
                "lr": job.point[LR],
                "weight_decay": job.point[DECAY],
                "accuracy": job.report["val_accuracy"] if job.report else None,
            }
            for job in search
        ],
        "step_share": median(report["optimizer_share"] for report in reports),
        "singular_values": spectra(chosen),
        "curve": [[r["tokens"], r["val_accuracy"]] for r in read_metrics(chosen.folder, "eval")],
    }


def verdict(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Manifold Muon's accuracy over AdamW's, in standard errors of the difference."""
    if not {"manifold_muon", "adamw"} <= rows.keys():
        return {}
    ours, theirs = rows["manifold_muon"], rows["adamw"]
    sem = math.hypot(ours["sem"], theirs["sem"])
    above = ours["accuracy"] - theirs["accuracy"]
    sems = above / sem if sem else math.inf
    return {"above_adamw": above, "sem": sem, "sems": sems, "beyond_2_sem": sems > 2}


def table(rows: Mapping[str, Any]) -> str:
    """The result as markdown, the best first."""
    heads = ["optimizer", "test accuracy", "test loss", "lr", "decay", "singular values"]
    heads += ["of step time"]
    lines = []
    for name, found in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        values = [v for one in found["singular_values"].values() for v in one]
        cells = [
            name,
            f"{found['accuracy']:.2%} ± {found['sem']:.2%}",
            f"{found['loss']:.3f} ± {found['loss_sem']:.3f}",
            f"{found['lr']:g}{'' if found['lr_inside_grid'] else ' (edge)'}",
            f"{found['weight_decay']:g}",
            f"{min(values):.2f} to {max(values):.2f}, median {median(values):.2f}",
            f"{found['step_share']:.0%}",
        ]
        lines.append(cells)
    return studies.markdown(heads, lines)


def picture(rows: Mapping[str, Any]) -> Figure:
    """Accuracies as bars, the search, and the spectra of the trained weights."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    bars, search, spectrum = figure.subplots(1, 3)
    for colour, (name, found) in zip(studies.COLOURS, rows.items(), strict=False):
        bars.bar(name, 100 * found["accuracy"], yerr=200 * found["sem"], color=colour)
        most: dict[float, float] = {}
        for one in found["search"]:
            if one["accuracy"] is not None:
                most[one["lr"]] = max(most.get(one["lr"], 0.0), 100 * one["accuracy"])
        search.plot(list(most), list(most.values()), "o-", color=colour, label=name)
        values = sorted(v for one in found["singular_values"].values() for v in one)
        shares = [(i + 0.5) / len(values) for i in range(len(values))]
        spectrum.plot(shares, values, color=colour, label=name)
    least = min(found["accuracy"] for found in rows.values())
    bars.set_ylim(100 * least - 5, None)
    bars.set_ylabel("test accuracy, %; bars of 2 SEM")
    bars.tick_params(axis="x", labelsize=8)
    search.set_xscale("log")
    search.set_xlabel("learning rate")
    search.legend(frameon=False, fontsize=8)
    spectrum.set_yscale("log")
    spectrum.set_xlabel("share of the singular values, all matrices")
    spectrum.set_ylabel("singular value")
    return figure


def run(arguments: Sequence[str]) -> int:
    """Search, repeat, and write the table."""
    told = studies.parser(__doc__, "images").parse_intermixed_args(arguments)
    if not told.draw:
        config, overrides, search = studies.jobs_of("images", told.overrides)
        finish(search, told)
        more = repeats(search, config, overrides)
        finish(more, told)
        others = by_arm(more)
        rows = {
            arm: row(jobs, others.get(arm, ()))
            for arm, jobs in by_arm(search).items()
            if best(jobs)
        }
        facts = studies.meta(studies.command_line(told, "images"), [*search, *more])
        studies.save(told.out, "images", {"meta": facts, "verdict": verdict(rows), **rows})
    print(studies.load(told.out, "images")["verdict"])
    studies.show(told.out, "images", table, picture)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
