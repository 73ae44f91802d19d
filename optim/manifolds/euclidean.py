import math
from dataclasses import dataclass

from torch import Generator, Tensor

from geon.optim.linalg import gaussian
from geon.optim.manifolds.base import Manifold


@dataclass(frozen=True)
class Euclidean(Manifold):
    """The whole space: every rule on it is unconstrained."""

    constrains = False
    flat = True

    def length(self, shape: tuple[int, ...]) -> float:
        """sqrt(d_out d_in), about the norm of the standard normal matrix that is drawn."""
        return math.sqrt(shape[-2] * shape[-1])

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Every vector is tangent."""
        return vector

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Every matrix is a point."""
        return weight

    def residual(self, weight: Tensor) -> Tensor:
        """Zero."""
        return weight.new_zeros(weight.shape[:-2])

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Standard normal matrix."""
        return gaussian(shape, generator)

    def project(self, weight: Tensor) -> Tensor:
        """Every matrix is a point."""
        return weight
