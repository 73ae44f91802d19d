from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.norms.base import Norm


@dataclass(frozen=True)
class Frobenius(Norm):
    """Euclidean norm of the entries, its own dual: normalised SGD."""

    def value(self, weight: Tensor) -> Tensor:
        """Frobenius norm of each matrix of the batch, (...)."""
        return torch.linalg.vector_norm(weight, dim=(-2, -1))

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the Frobenius norm again."""
        return torch.linalg.vector_norm(grad, dim=(-2, -1))

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: the gradient over its Frobenius norm."""
        return unit_frobenius(grad)

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point of norm 1: a Gaussian matrix, scaled."""
        return unit_frobenius(gaussian(shape, generator))

    def extent(self, shape: tuple[int, ...]) -> float:
        """Extent, the Frobenius norm of a full direction: 1."""
        return 1.0
