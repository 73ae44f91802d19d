from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geon.optim.finishes.base import Finish
from geon.optim.linalg import frobenius, inner
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm, Reach


@dataclass(frozen=True)
class RadialBrake(Finish):
    """Slower growth of a weight's Frobenius norm: only a share of a step's part along W is kept.

    The part along W is that of the whole step, decay included; what a straight step adds to the
    norm at second order is taken off. 0 and 0 keep the norm, 1 and 1 only take that off.

    Attributes:
        outward: share of a step away from the origin that is kept.
        inward: share of a step towards it.

    Source: the radial brake of modded-nanogpt's track 3, pull request 294 (2026); with 0 outward
        about AdamP (arXiv 2006.08217).
    """

    outward: float = 0.5
    inward: float = 1.0

    reach: ClassVar[Reach] = Reach.MATRIX
    needs_weight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, share in (("outward", self.outward), ("inward", self.inward)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"radial_brake {name} {share} is a share: it must be in [0, 1]")

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse a manifold that sets the size of its weights."""
        if not manifold.flat:
            raise ValueError(
                f"radial_brake slows the growth of a weight, but {type(manifold).__name__} sets "
                "its size: it needs manifold=euclidean or spectral_ball"
            )

    def settle(self, weight: Tensor, moved: Tensor) -> Tensor:
        """Weights at the norm ||W|| + share <W/||W||, step>; from W = 0 as the step left them."""
        size = frobenius(weight)
        unit = weight / size.clamp_min(1e-30)
        radial = inner(unit, moved - weight)
        kept = self.outward * radial.clamp(min=0.0) + self.inward * radial.clamp(max=0.0)
        braked = moved + (kept - radial) * unit
        scale = (size + kept).abs() / frobenius(braked).clamp_min(1e-30)
        return torch.where(size > 0, braked * scale, moved)

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return f"radial brake {self.outward:g} {self.inward:g}"
