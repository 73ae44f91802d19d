"""What a manifold must offer for weights to live on it: a small verb set on whole matrices."""

from abc import ABC, abstractmethod

from torch import Generator, Tensor


class Manifold(ABC):
    """A set of matrices (..., d_out, d_in), as weights are stored (scale included)."""

    constrains: bool = True
    """False for the whole space: then a step needs no weight, only a gradient."""

    @abstractmethod
    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Orthogonal projection of `vector` on the tangent space at `weight`."""

    @abstractmethod
    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Return a point that left the manifold by one step of this `angle` (radians) to it."""

    @abstractmethod
    def residual(self, weight: Tensor) -> Tensor:
        """How far each matrix of the batch is from the manifold: the largest violated entry."""

    @abstractmethod
    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Draw a point of the manifold."""

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of the manifold, from anywhere; slow and exact, for initialisation.

        Raises:
            ValueError: the weight has no nearest point (a zero matrix, say).
        """
