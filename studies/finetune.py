"""Fine-tuning a model that another library made: recipes against AdamW. `make finetune`.

python -m geon.studies.finetune --json docs/results/finetune.json

Pretrains a small Llama of transformers on the code of the standard library by torch.optim.AdamW,
saves it, loads it by from_pretrained, and fine-tunes it on the documentation in pydoc_data.topics.
Each arm is tuned by equally many runs under seed 0, one knob after the other: the rate, the rates
of what is no hidden matrix, no decay. The best point runs under every seed, which is that of the
base model and of the order of the text. Finished runs stay in --output, so the same command
resumes. Needs transformers: pip install 'geon[hf]'.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from geon.benches import results
from geon.benches.solver import check_output
from geon.configs.recipes import read
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.optim import build
from geon.scripts.flags import whole
from geon.studies import finetune_base as start
from geon.studies import shared as studies
from geon.studies.finetune_base import Size, kept

Row = dict[str, Any]
OCTAVES = (-2, -1, 0, 1, 2, 3)
"""Rates that are searched, around the arm's."""
MULTIPLES = {"others": (0.25, 4.0), "decay": (0.0,)}
"""What is searched at the best rate: multiples of the recipe's ratio to the rate, and decay."""


class Arm(NamedTuple):
    """A recipe, the middle of its rates, and what is changed in it."""

    recipe: str
    lr: float
    changes: Mapping[str, Any] = {}


ARMS = {
    "adamw": Arm("adamw", 1e-3),
    "muon": Arm("muon", 0.01),
    "normuon": Arm("normuon", 0.01),
    "hybrid": Arm("hybrid", 0.02),
    "hybrid_ball": Arm("hybrid", 0.02, {"overrides.qk": None}),
}
"""hybrid_ball: q and k in the spectral ball as the other matrices, instead of heads on DGram."""


class Point(NamedTuple):
    """A rate, and multiples of the recipe's other rates and of its decays."""

    lr: float
    others: float = 1.0
    decay: float = 1.0

    def settings(self, arm: Arm) -> Row:
        """What `build` is told; rates that the recipe gives as numbers follow this one too."""
        config = read(arm.recipe, settings=arm.changes)
        rest = {name: getattr(config, name) for name in ("embedding", "head", "rest")}
        rules = {"hidden": config.hidden, **rest}
        rules |= {f"overrides.{name}": rule for name, rule in config.overrides.items()}
        scale = self.others * self.lr / config.lr
        rates = {f"{name}.lr": scale * rule.lr for name, rule in rest.items()}
        decays = {f"{k}.weight_decay": self.decay * rule.weight_decay for k, rule in rules.items()}
        return {**arm.changes, **rates, **decays}


class Study:
    """Base models and runs of one size, kept in a folder."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size, self.texts = folder, size, start.texts()
        folder.mkdir(parents=True, exist_ok=True)
        self.facts = {**asdict(size), "bytes": {k: len(text) for k, text in self.texts.items()}}
        if kept(folder, "study", lambda: self.facts) != self.facts:
            raise UsageError(f"--output '{folder}' holds runs of other sizes: name another")

    def loss(self, model: nn.Module, text: str = "topics held out") -> float:
        """Loss on a text."""
        return start.loss(model, self.texts[text], self.size)

    def saved(self, seed: int) -> Path:
        """Folder of a base model."""
        return self.folder / f"base-{seed}"

    def base(self, seed: int) -> Row:
        """Losses of a base model, pretrained if it is not there."""

        def make() -> Row:
            model = start.pretrain(self.texts["code"], self.size, seed, self.saved(seed))
            parameters = sum(param.numel() for param in model.parameters())
            code = self.loss(model, "code held out")
            return {"loss": self.loss(model), "loss_on_code": code, "parameters": parameters}

        return {"seed": seed, **kept(self.folder, f"base-{seed}", make)}

    def projected(self, name: str, seed: int) -> Row:
        """What an arm does to weights and loss of a base before the first step."""

        def make() -> Row:
            model, arm = start.load(self.saved(seed)), ARMS[name]
            before = {key: param.detach().clone() for key, param in model.named_parameters()}
            build(model, arm.recipe, settings=arm.changes, project=True, verbose=not seed)
            pairs = [(key, before[key], param.detach()) for key, param in model.named_parameters()]
            moved = {key: float((new - old).norm() / old.norm()) for key, old, new in pairs}
            far = {key: round(by, 4) for key, by in moved.items() if by > 1e-3}
            return {"loss": self.loss(model), "moved": far}

        return {"seed": seed, **kept(self.folder, f"projected-{name}-{seed}", make)}

    def run(self, name: str, point: Point, seed: int, variant: str = "") -> Row:
        """Loss of one fine-tuning.

        variant: scratch, from a model that was just drawn; torch, by torch.optim.AdamW itself.
        """
        arm, size, settings = ARMS[name], self.size, point.settings(ARMS[name])

        def make() -> Row:
            drawn = variant == "scratch"
            model = start.new_model(size, seed) if drawn else start.load(self.saved(seed))
            optimizer: torch.optim.Optimizer = build(
                model, arm.recipe, point.lr, settings=settings, project=True, verbose=False
            )
            if variant == "torch":
                keys = ("params", "lr", "betas", "eps", "weight_decay")
                groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
                optimizer = torch.optim.AdamW(groups)
            order = start.batches(self.texts["topics"], size, size.batch, seed)
            start.train(model, optimizer, order, size.steps)
            return {"loss": self.loss(model)}

        label = f"{name}-{variant}" if variant else name
        file = "-".join([label, *(f"{number:g}" for number in point), str(seed)])
        about = {"arm": label, "seed": seed, **point._asdict(), "settings": settings}
        return about | kept(self.folder, file, make)

    def search(self, name: str) -> list[Row]:
        """Every run that an arm is tuned by."""
        rows = [self.run(name, Point(ARMS[name].lr * 2.0**k), 0) for k in OCTAVES]
        for knob, values in MULTIPLES.items():
            best = best_of(rows)
            rows += [self.run(name, best._replace(**{knob: value}), 0) for value in values]
        return rows


def best_of(rows: Sequence[Row]) -> Point:
    """The point of the least loss."""
    row = min(rows, key=lambda one: one["loss"])
    return Point(*(row[knob] for knob in Point._fields))


def verdict(study: Study, arms: Sequence[str], seeds: Sequence[int]) -> Row:
    """Run everything; arm -> its best point and losses, base models, and a row a run."""
    bases = [study.base(seed) for seed in sorted({0, *seeds})]
    found: Row = {"base": bases, "arms": {}, "rows": []}
    for name in arms:
        search = study.search(name)
        best, rates = best_of(search), [row["lr"] for row in search]
        rows = [study.run(name, best, seed) for seed in seeds]
        losses = [row["loss"] for row in rows]
        found["rows"] += search + [row for row in rows if row not in search]
        found["arms"][name] = {
            "losses": losses,
            "loss": statistics.fmean(losses),
            "sd": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            **best._asdict(),
            "lr_inside_grid": min(rates) < best.lr < max(rates),
            "projected": [study.projected(name, seed) for seed in seeds],
        }
    if "adamw" in arms:
        best = best_of([row for row in found["rows"] if row["arm"] == "adamw" and not row["seed"]])
        found["rows"].append(study.run("adamw", best, 0, "torch"))
        found["rows"].append(study.run("adamw", Point(start.BASE_LR), 0, "scratch"))
    return found


def table(found: Row) -> str:
    """Markdown: a row an arm, the best first."""
    head = "optimizer | nats/byte | sd | minus adamw | lr | others | decay | moved | loss then"
    lines = [f"| {head} |", "|---" * 9 + "|"]
    arms: dict[str, Row] = found["arms"]
    for name, one in sorted(arms.items(), key=lambda item: item[1]["loss"]):
        pairs = zip(one["losses"], arms.get("adamw", one)["losses"], strict=True)
        apart = [ours - theirs for ours, theirs in pairs]
        moved = [by for row in one["projected"] for by in row["moved"].values()]
        cells = [
            f"{name} | {one['loss']:.4f} | {one['sd']:.4f}",
            "{:+.4f} ± {:.4f}".format(*studies.mean_sem(apart)) if any(apart) else "",
            f"{one['lr']:g}{'' if one['lr_inside_grid'] else ' (edge)'}",
            f"x {one['others']:g} | x {one['decay']:g}",
            f"{len(moved) // len(one['losses'])}, most {max(moved):.0%}" if moved else "none",
            f"{statistics.fmean(row['loss'] for row in one['projected']):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def brief(found: Row) -> Row:
    """Without the settings of each run, which are `Point.settings` of its arm and point."""
    rows = [{k: v for k, v in row.items() if k != "settings"} for row in found["rows"]]
    return {**found, "rows": rows}


def meta(study: Study, found: Row, arguments: Sequence[str]) -> Row:
    """Where a result file comes from: the command says nothing of folders."""
    places = ("--json", "--output")
    pairs = zip(arguments, ["", *arguments], strict=False)
    words = [word for word, last in pairs if last not in places and not word.startswith(places)]
    facts = studies.meta(" ".join(["python -m geon.studies.finetune", *words]), [])
    facts["versions"]["transformers"] = version("transformers")
    every = [*found["base"], *found["rows"]]
    del facts["train_seconds"], facts["finished"]
    spent = {"jobs": len(every), "cpu_seconds": round(sum(row["cpu_seconds"] for row in every), 1)}
    return {**facts, **spent, **study.facts}


def run(arguments: Sequence[str]) -> int:
    """Run what has not finished, and write what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write the rows there")
    add("--output", type=Path, default=Path("runs/finetune"), help="models and runs (%(default)s)")
    add("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="all if none")
    add("--seeds", type=whole(), default=3, help="at the best point (%(default)s)")
    for field in fields(Size):
        option = f"--{field.name.replace('_', '-')}"
        add(option, type=whole(0), default=field.default, help="%(default)s")
    told = parser.parse_args(arguments)
    check_output(told.json)
    size = Size(**{field.name: getattr(told, field.name) for field in fields(Size)})
    study = Study(told.output, size)
    found = verdict(study, told.arms, range(told.seeds))
    print(table(found))
    if told.json:
        results.write(told.json, {"meta": meta(study, found, arguments), **brief(found)})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
