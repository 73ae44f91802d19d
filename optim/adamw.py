"""The element-wise fallback, on local shards: torch's own AdamW kernel behind our group format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from geon.optim.entries import EntryRule, State, check_averages
from geon.optim.step import local

_FUSED = ("cuda",)
"""Devices on which torch's fused kernel steps all parameters at once. Its CPU kernel rounds the
last few entries of a tensor otherwise than the rest, so shards would not step as the whole does.
"""


@dataclass(frozen=True)
class AdamW(EntryRule):
    """Settings of an element-wise group (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        betas: fractions of the two averages kept.
        eps: added to the root of the second average.
        decay: decoupled weight decay, per unit of lr.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0

    def __post_init__(self) -> None:
        self.check(self.hyper)

    @property
    def name(self) -> str:
        """Name of the rule: AdamW."""
        return "AdamW"

    @property
    def hyper(self) -> dict[str, Any]:
        """Numbers of a param group, by the names that torch.optim.AdamW gives them."""
        return {"betas": tuple(self.betas), "eps": self.eps, "weight_decay": self.decay}

    def check(self, numbers: Mapping[str, Any]) -> None:
        """Refuse betas outside [0, 1), and eps or weight_decay below 0 or infinite."""
        check_averages("AdamW", numbers)

    def new_state(self, param: Tensor) -> State:
        """State at first: averages of 0 like the parameter (a DTensor's too), and a step count.

        The count is on the CPU, or beside the parameter where the kernel is the fused one.
        """
        fused = param.device.type in _FUSED
        return {
            "step": torch.zeros((), device=param.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(param, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
        }

    def step(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """Take one AdamW step at the group's lr, betas, eps and weight_decay."""
        adamw(
            [local(p) for p in params],
            list(grads),
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=all(p.device.type in _FUSED for p in params) or None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def describe(self) -> str:
        """Describe the rule in one line, for tables."""
        text = f"AdamW, betas {self.betas[0]:g} {self.betas[1]:g}"
        return text + (f", decay {self.decay:g}" if self.decay else "")
