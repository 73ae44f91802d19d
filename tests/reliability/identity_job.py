"""Runs in this process, small and quick, for the tests of identity and resume."""

import json
from pathlib import Path

from geon.engine.main import execute
from geon.launch.compose import compose
from geon.launch.env import Env

TINY = [
    "data=synthetic",
    "data.tokens=6000",
    "data.vocab_size=32",
    "data.val_tokens=256",
    "data.batch_tokens=128",
    "model.n_layer=1",
    "model.n_head=2",
    "model.d_model=16",
    "model.context=16",
    "optim=muon",
    "schedule.steps=8",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "logger.every=2",
    "logger.progress=false",
    "device=cpu",
    "parallel=single",
]


class Killed(BaseException):
    """What stands for a kill: nothing is written after it."""


def train(output: Path, *overrides: str, env: Env | None = None) -> Path:
    """Train a run to its end; returns its folder."""
    config = compose([*TINY, f"output={output}", *overrides])
    execute(config, env or Env())
    return output / config.name


def train_until(monkeypatch, step: int, output: Path, *overrides: str, env: Env | None = None):
    """Train, and die in the midst of a step: after `step` steps, none of them lost by it."""
    from geon.engine import opening
    from geon.engine.trainer import Trainer

    take = Trainer.train_step

    def step_or_die(self):
        if self.step == step:
            raise Killed
        take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_die)
        patch.setattr(opening.history, "append", only_starts(opening.history.append))
        try:
            train(output, *overrides, env=env)
        except Killed:
            return
    raise AssertionError("it was to die")


def only_starts(append):
    """A killed process writes no end."""
    return lambda folder, row: append(folder, row) if row["event"] == "start" else None


def rows(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints directly in a folder."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*"))


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def weights(folder: Path) -> dict:
    from geon.engine import checkpoint
    from geon.models import MODELS, ModelShape

    found = checkpoint.find(folder)
    shape = dict(checkpoint.read_commit(found)["model"])
    model = MODELS[shape.pop("arch")](ModelShape(**shape))
    checkpoint.load_weights(found, model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}
