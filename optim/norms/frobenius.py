from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.norms.base import Norm


@dataclass(frozen=True)
class Frobenius(Norm):
    """Euclidean norm of the entries, its own dual: normalised SGD."""

    def value(self, weight: Tensor) -> Tensor:
        """Frobenius norm."""
        return torch.linalg.vector_norm(weight, dim=(-2, -1))

    def dual(self, grad: Tensor) -> Tensor:
        """Frobenius norm."""
        return torch.linalg.vector_norm(grad, dim=(-2, -1))

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Gradient over its norm."""
        return unit_frobenius(grad)

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Gaussian scaled to norm 1."""
        return unit_frobenius(gaussian(shape, generator))

    def extent(self, shape: tuple[int, ...]) -> float:
        """1."""
        return 1.0
