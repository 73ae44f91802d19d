from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geon.optim.finishes.base import Finish, Move
from geon.optim.finishes.row_moments import needs_free_polar
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm, Reach


@dataclass(frozen=True)
class EvenRows(Finish):
    """All rows of a polar factor at one length, ||D||_F as before: NorMuon without its state.

    What `RowMoments` does when it keeps nothing. A row that is zero stays zero.
    """

    reach: ClassVar[Reach] = Reach.MATRIX

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse directions that are not polar factors, or that must stay tangent."""
        needs_free_polar("even_rows gives the rows of a polar factor one length", norm, manifold)

    def direct(self, direction: Tensor, weight: Tensor | None, move: Move) -> Tensor:
        """Directions with rows D_i mean / |D_i|, mean the root mean square of the lengths."""
        rows = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        mean = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / rows.shape[-2] ** 0.5
        return direction * (mean / rows.clamp_min(1e-20))

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return "even rows"
