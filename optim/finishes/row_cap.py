from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geon.optim.finishes.base import Finish, Move
from geon.optim.norms import Reach


@dataclass(frozen=True)
class RowCap(Finish):
    """Rows of a direction no longer than `most` times what they are in a direction of even rows.

    Attributes:
        most: largest length, in units of the root mean square of a full direction's rows.
    """

    most: float = 2.0

    reach: ClassVar[Reach] = Reach.ROW

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ValueError(f"row_cap most {self.most}: the longest row must be above 0")

    def direct(self, direction: Tensor, weight: Tensor | None, move: Move) -> Tensor:
        """Directions with rows D_i min(1, most extent / (sqrt(d_out) |D_i|))."""
        bound = self.most * move.extent / move.shape[0] ** 0.5
        rows = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        return direction * (bound / rows.clamp_min(1e-30)).clamp(max=1.0)

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return f"row cap {self.most:g}"
