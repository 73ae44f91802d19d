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
        """RMS of the entries."""
        return torch.linalg.vector_norm(weight, dim=(-2, -1)) / math.sqrt(_count(weight.shape))

    def dual(self, grad: Tensor) -> Tensor:
        """2-norm times sqrt(n)."""
        return torch.linalg.vector_norm(grad, dim=(-2, -1)) * math.sqrt(_count(grad.shape))

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Gradient over its RMS."""
        return unit_frobenius(grad) * math.sqrt(_count(shape or grad.shape))

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Gaussian scaled to RMS 1."""
        return unit_frobenius(gaussian(shape, generator)) * math.sqrt(_count(shape))

    def extent(self, shape: tuple[int, ...]) -> float:
        """sqrt(n)."""
        return math.sqrt(_count(shape))


def _count(shape: tuple[int, ...]) -> int:
    return shape[-2] * shape[-1]
