import math
from dataclasses import dataclass

from torch import Generator, Tensor

from geon.optim.costs import Cost
from geon.optim.linalg import gaussian
from geon.optim.manifolds.base import Manifold


@dataclass(frozen=True)
class Euclidean(Manifold):
    """The whole space: every rule on it is unconstrained."""

    constrains = False
    flat = True

    def length(self, shape: tuple[int, ...]) -> float:
        """Typical Frobenius norm sqrt(d_out d_in): about that of a standard normal matrix."""
        return math.sqrt(shape[-2] * shape[-1])

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part of a vector: the vector itself, as every one is tangent."""
        return vector

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Retracted weight: the weight itself, as every matrix is a point."""
        return weight

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of a retraction: none."""
        return Cost()

    def residual(self, weight: Tensor) -> Tensor:
        """Residual of each matrix of the batch: 0."""
        return weight.new_zeros(weight.shape[:-2])

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point: a standard normal matrix."""
        return gaussian(shape, generator)

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of a weight: the weight itself, as every matrix is a point."""
        return weight
