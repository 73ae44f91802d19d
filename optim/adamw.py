"""The element-wise fallback, on local shards: torch's own AdamW kernel behind our group format."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Tensor]


@dataclass(frozen=True)
class AdamW:
    """Settings of an element-wise group (Loshchilov and Hutter, arXiv 1711.05101).

    Attributes:
        betas: fractions of the two averages kept.
        eps: added to the root of the second average.
        decay: decoupled weight decay, per unit of lr.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0

    def new_state(self, param: Tensor) -> State:
        """Zero averages like the parameter (a DTensor stays one) and a step count on the CPU."""
        return {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }

    def step(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        lr: float,
    ) -> None:
        """Update the weights and states in place."""
        adamw(
            list(weights),
            list(grads),
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=self.decay,
            eps=self.eps,
            maximize=False,
        )

    def describe(self) -> str:
        """One line for tables."""
        text = f"AdamW, betas {self.betas[0]:g} {self.betas[1]:g}"
        return text + (f", decay {self.decay:g}" if self.decay else "")
