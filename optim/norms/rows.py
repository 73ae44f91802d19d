"""Norms that treat a matrix row by row."""

import math
from abc import abstractmethod
from dataclasses import dataclass

from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.norms.base import Norm, Reach


class RowWise(Norm):
    """max over rows of ||row||_2 / row_radius: each row has a ball of its own."""

    reach = Reach.ROW

    @abstractmethod
    def row_radius(self, shape: tuple[int, ...]) -> float:
        """Row radius: 2-norm of each row of a full direction of this shape."""

    def value(self, weight: Tensor) -> Tensor:
        """Norm of each matrix, (...): the largest 2-norm of a row over the row radius."""
        return weight.norm(dim=-1).amax(dim=-1) / self.row_radius(weight.shape)

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the sum of 2-norms of rows times the row radius."""
        return grad.norm(dim=-1).sum(dim=-1) * self.row_radius(grad.shape)

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: rows at the row radius; zero rows (unseen tokens) stay zero."""
        return unit_frobenius(grad, dim=-1) * self.row_radius(shape or grad.shape)

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point of norm 1: Gaussian rows, scaled to the row radius."""
        return unit_frobenius(gaussian(shape, generator), dim=-1) * self.row_radius(shape)

    def extent(self, shape: tuple[int, ...]) -> float:
        """Extent, the Frobenius norm of a full direction: the row radius times sqrt(rows)."""
        return self.row_radius(shape) * math.sqrt(shape[-2])


@dataclass(frozen=True)
class ColNorm(RowWise):
    """1 -> RMS norm of an embedding: the largest RMS of a token vector.

    The map from one-hot tokens to vectors is (d, vocab), and its columns are the token vectors;
    torch stores it transposed, (vocab, d), so here they are the rows.

    Source: Pethick et al., arXiv 2502.07529, Table 2.
    """

    def row_radius(self, shape: tuple[int, ...]) -> float:
        """Row radius: sqrt(d), so that a row has RMS 1."""
        return math.sqrt(shape[-1])


@dataclass(frozen=True)
class RowNorm(RowWise):
    """RMS -> inf norm: each row of unit sphere radius 1/sqrt(d_in). An option for heads.

    Source: Pethick et al., arXiv 2502.07529, Table 2.
    """

    def row_radius(self, shape: tuple[int, ...]) -> float:
        """Row radius: 1 / sqrt(d_in)."""
        return 1.0 / math.sqrt(shape[-1])
