"""Adam with one second moment a row: for embeddings and heads, whose rows are tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.entries import EntryRule, State, check_averages
from geon.optim.norms import RowNorm, RowWise
from geon.optim.step import local

_LEAST = 1e-12
"""Added to the root of a second moment: a row that never had a gradient stays where it is."""


@dataclass(frozen=True)
class RowAdam(EntryRule):
    """weight_i <- (1 - lr decay) weight_i - lr radius R m_i / sqrt(v_i), for each row i.

    m averages the row's gradients, v their squared 2-norms without the bias of its start, and R is
    the row radius of the norm. A row whose gradients agree steps by its full length, as under the
    norm alone; one whose gradients are noise steps by less. The state is that of a momentum, and a
    number a row.

    Attributes:
        norm: sets the length of a full row, and with it how rates carry over to other widths.
        radius: norm of a full step at lr 1.
        betas: fractions of the two averages kept.
        decay: decoupled weight decay, per unit of lr.

    Source: the blocks are those of Adam-mini (Y. Zhang et al., arXiv 2406.16793), which takes one a
        token for embedding and output layer.
    """

    norm: RowWise = field(default_factory=RowNorm)
    radius: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0

    whole_rows = True

    def __post_init__(self) -> None:
        if not isinstance(self.norm, RowWise):
            raise UsageError(
                f"adam_rows steps rows: its norm is rownorm or colnorm, not "
                f"{type(self.norm).__name__}"
            )
        if not 0.0 < self.radius < float("inf"):
            raise UsageError(f"adam_rows radius {self.radius} must be finite and above 0")
        self.check(self.hyper)

    @property
    def name(self) -> str:
        """Name of the rule: RowAdam."""
        return "RowAdam"

    @property
    def hyper(self) -> dict[str, Any]:
        """Numbers of a param group: betas and weight_decay."""
        return {"betas": tuple(self.betas), "weight_decay": self.decay}

    def check(self, numbers: Mapping[str, Any]) -> None:
        """Refuse betas outside [0, 1), and a weight_decay below 0 or infinite."""
        check_averages("adam_rows", numbers)

    def new_state(self, param: Tensor) -> State:
        """State at first: a zero average like the parameter, zeros (rows, 1), and a step count.

        Of a DTensor, both are DTensors that are cut as it is.
        """
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(param, requires_grad=False),
            "row_exp_avg_sq": _row_zeros(param),
        }

    @torch.no_grad()
    def step(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """Take one step at the group's lr, betas and weight_decay."""
        lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
        for param, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            weight, average = local(param), local(state["exp_avg"])
            squares, wide = local(state["row_exp_avg_sq"]), grad.float()
            average.lerp_(grad.to(average.dtype), 1.0 - beta1)
            squares.lerp_(wide.square().sum(-1, keepdim=True), 1.0 - beta2)
            root = (squares / (1.0 - beta2 ** float(state["step"]))).sqrt_().add_(_LEAST)
            length = lr * self.radius * self.norm.row_radius(tuple(param.shape))
            weight.mul_(1.0 - lr * decay)
            weight.sub_((average.float() / root).mul_(length).to(weight.dtype))

    def describe(self) -> str:
        """Describe the rule in one line, for tables."""
        betas = f"betas {self.betas[0]:g} {self.betas[1]:g}"
        text = f"Adam a row, {type(self.norm).__name__}, {betas}, radius {self.radius:g}"
        return text + (f", decay {self.decay:g}" if self.decay else "")


def _row_zeros(param: Any) -> Tensor:
    """Zeros (rows, 1) in fp32, a DTensor's as a DTensor of the same rows."""
    own = local(param)
    zeros = torch.zeros((*own.shape[:-1], 1), dtype=torch.float32, device=own.device)
    if own is param or not hasattr(param, "placements"):
        return zeros
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*param.shape[:-1], 1])
    return DTensor.from_local(
        zeros, param.device_mesh, param.placements, run_check=False, shape=shape, stride=(1, 1)
    )
