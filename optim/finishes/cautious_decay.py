from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from geon.optim.finishes.base import Finish, Move
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm


@dataclass(frozen=True)
class CautiousDecay(Finish):
    """Weight decay only of entries that the step moves towards zero anyway: where D W > 0.

    The strength is the rule's own weight decay.

    Source: L. Chen et al., cautious weight decay, arXiv 2510.12402.
    """

    needs_weight: ClassVar[bool] = True
    decays: ClassVar[bool] = True

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse a rule without weight decay."""
        if not decay > 0:
            raise ValueError(
                f"cautious_decay chooses which entries decay, but weight_decay is {decay}: set "
                "weight_decay above 0, or take the finish away"
            )

    def direct(self, direction: Tensor, weight: Tensor | None, move: Move) -> Tensor:
        """Directions D + (decay / length) W [D W > 0]: the step takes lr decay W off there."""
        assert weight is not None
        share = move.decay / move.length
        return direction + share * weight * (direction * weight > 0)

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return "cautious decay"
