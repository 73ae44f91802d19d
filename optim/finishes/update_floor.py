import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from geon.optim.finishes.base import Finish, Move
from geon.optim.linalg import frobenius
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm, Reach


@dataclass(frozen=True)
class UpdateFloor(Finish):
    """Steps at lr 1 of at least `least` times the weight's size: ||length D||_F >= least ||W||_F.

    Lengthens the directions of weights that have grown, and shortens none; zero stays zero.

    Attributes:
        least: smallest ratio of the two Frobenius norms.

    Source: the update/weight floor of modded-nanogpt's track 3 (2026); no paper is known to us.
    """

    least: float = 0.35

    reach: ClassVar[Reach] = Reach.MATRIX
    needs_weight: ClassVar[bool] = True
    keeps_tangent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.least < math.inf:
            raise ValueError(f"update_floor least {self.least}: a finite ratio above 0 is needed")

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse steps of more than 1 radian at lr 1 on a manifold: its retraction needs less."""
        if self.least > 1 and not manifold.flat:
            raise ValueError(
                f"update_floor least {self.least} on {type(manifold).__name__}: steps would be "
                "longer than the lr radians that its retraction expects; set least to 1 at most"
            )

    def direct(self, direction: Tensor, weight: Tensor | None, move: Move) -> Tensor:
        """Directions D max(1, least ||W||_F / ||length D||_F)."""
        assert weight is not None
        size = (move.length * frobenius(direction)).clamp_min(1e-30)
        return direction * (self.least * frobenius(weight) / size).clamp(min=1.0)

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return f"update floor {self.least:g}"
