"""Callbacks that look at the geometry of a run: directions, certificates, recorded pairs."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from geon.engine.trainer import Callback, Trainer
from geon.optim import Block, ParamInfo, Role, Rule

PAIRS = "pairs.pt"


class Geometry(Callback):
    """Inspects the directions of a step every so often: certified gap, tangency, residual.

    Cost: on the steps it looks at, some eigendecompositions per matrix in float64.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def before_update(self, trainer: Trainer) -> None:
        """Ask the optimizer for readings of the coming step, at intervals."""
        if (trainer.step + 1) % self.every == 0:
            trainer.run.optimizer.readings.wanted = True

    def on_step(self, trainer: Trainer) -> None:
        """Log the readings of the step."""
        if trainer.step % self.every:
            return
        readings = trainer.run.optimizer.readings
        everyone = trainer.run.parallel.gather(readings.values())
        if trainer.run.parallel.env.main:
            found = readings.summary(everyone)
            if found:
                trainer.log("geometry", dict(found))


class RecordPairs(Callback):
    """Saves (step, weight, averaged gradient) of every hidden matrix at the given steps.

    The file is what benches/solver.py reads: {name: [(step, W, momentum), ...]}, whole
    matrices as stored, the momentum as the direction is taken of it.
    """

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)
        self._pairs: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def before_update(self, trainer: Trainer) -> None:
        """Record the pairs of the coming step on every rank, and save them on the main one."""
        step = trainer.step + 1
        if step not in self.steps:
            return
        run = trainer.run
        params = dict(run.model.named_parameters())
        for info in run.routing.infos:
            rule, param = run.routing.rule(info), params[info.name]
            if info.role is not Role.HIDDEN or not isinstance(rule, Rule) or param.grad is None:
                continue
            buffer = _whole(run.optimizer.state[param]["momentum"])
            update = rule.average(_whole(param.grad).to(buffer), buffer)
            weight = _whole(param)
            for block in run.routing.blocks(info):
                pair = (step, weight[block.slices].cpu(), update[block.slices].cpu())
                self._pairs.setdefault(_name(info, block), []).append(pair)
        if run.parallel.env.main:
            torch.save(self._pairs, trainer.folder / PAIRS)


def _name(info: ParamInfo, block: Block) -> str:
    if block.box == info.matrix_shape:
        return info.name
    return f"{info.name}[{block.rows[0]}:{block.rows[1]}, {block.cols[0]}:{block.cols[1]}]"


def _whole(tensor: Any) -> Tensor:
    """A copy of the whole tensor; gathers a sharded one, so every rank must call."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()
