from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from geon.optim.finishes.base import Finish
from geon.optim.linalg import frobenius
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm, Reach, Spectral


@dataclass(frozen=True)
class RowMoments(Finish):
    """NorMuon: rows over the root of their running mean square, ||D||_F as before.

    Attributes:
        kept: fraction of the running mean kept at each step.

    Source: Z. Li et al., NorMuon, arXiv 2510.05491.
    """

    kept: float = 0.95

    reach: ClassVar[Reach] = Reach.MATRIX
    row_state: ClassVar[str] = "second_moment"

    def __post_init__(self) -> None:
        if not 0.0 <= self.kept < 1.0:
            raise ValueError(
                f"second_moment {self.kept} is the fraction kept: it must be in [0, 1)"
            )

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse directions that are not polar factors, or that must stay tangent."""
        needs_free_polar(
            f"second_moment {self.kept} divides the rows of a polar factor", norm, manifold
        )

    def direct_with(self, direction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Directions D_i / sqrt(v_i), ||D||_F as before, and the rows' mean squares v."""
        rows = rows.lerp(direction.square().mean(dim=-1), 1.0 - self.kept)
        divided = direction / rows.sqrt().clamp_min(1e-12).unsqueeze(-1)
        size = frobenius(divided).clamp_min(1e-30)
        return divided * (frobenius(direction) / size), rows

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return f"second moment {self.kept:g}"


def needs_free_polar(what: str, norm: Norm, manifold: Manifold) -> None:
    """Raise ValueError unless directions are polar factors, and every direction is tangent."""
    if not (manifold.flat and isinstance(norm, Spectral)):
        raise ValueError(
            f"{what}: it needs norm=spectral and manifold=euclidean or spectral_ball, not "
            f"{type(norm).__name__} x {type(manifold).__name__}"
        )
