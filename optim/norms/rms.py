import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.norms.base import Norm


@dataclass(frozen=True)
class RMS(Norm):
    """Root mean square over all entries: gains and biases, seen as one row (1, n)."""

    def value(self, weight: Tensor) -> Tensor:
        """Root mean square of the entries of each matrix, (...)."""
        return torch.linalg.vector_norm(weight, dim=(-2, -1)) / math.sqrt(_count(weight.shape))

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the 2-norm times sqrt(n), n the number of entries."""
        return torch.linalg.vector_norm(grad, dim=(-2, -1)) * math.sqrt(_count(grad.shape))

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: the gradient over its root mean square."""
        return unit_frobenius(grad) * math.sqrt(_count(shape or grad.shape))

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point of norm 1: a Gaussian matrix, scaled."""
        return unit_frobenius(gaussian(shape, generator)) * math.sqrt(_count(shape))

    def extent(self, shape: tuple[int, ...]) -> float:
        """Extent, the Frobenius norm of a full direction: sqrt(n), n the number of entries."""
        return math.sqrt(_count(shape))


def _count(shape: tuple[int, ...]) -> int:
    return shape[-2] * shape[-1]
