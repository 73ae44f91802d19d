"""What a manifold must offer for weights to live on it: a small verb set on whole matrices."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Generator, Tensor

from geon.optim.costs import Cost


class Manifold(ABC):
    """A set of matrices (..., d_out, d_in), as weights are stored (scale included)."""

    constrains: ClassVar[bool] = True
    """False for the whole space: then a step needs no weight, only a gradient."""

    flat: ClassVar[bool] = False
    """True where every direction is tangent: the norm alone then gives the steepest one."""

    removes_decay: ClassVar[bool] = False
    """True where `retract` brings (1 - a) W back to W: there decoupled weight decay does nothing.

    Either W is normal to the manifold at itself, or the retraction divides by the size of W.
    """

    most_angle: ClassVar[float] = 1000.0
    """Largest step in radians: of a longer one, fp32 loses the weight that it starts from."""

    @abstractmethod
    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of a point of this shape, as stored.

        Where points differ in it, that of a typical starting point.
        """

    @abstractmethod
    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Orthogonal projection of `vector` on the tangent space at `weight`."""

    @abstractmethod
    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Return a point that left the manifold by one step of this `angle` (radians) to it.

        No refusal, as it runs at every step, and no host synchronisation; the spectral ball alone
        waits, because its cap costs more than the wait.
        """

    @abstractmethod
    def residual(self, weight: Tensor) -> Tensor:
        """How far each matrix of the batch is from the manifold, relative to its own scale."""

    @abstractmethod
    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Draw a point of the manifold."""

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of the manifold, from anywhere; slow and exact, for initialisation.

        Raises:
            ValueError: the weight has no nearest point (a zero matrix, say).
        """

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of one retraction of a matrix of this shape; element-wise by default."""
        return Cost(words=10 * shape[0] * shape[1], operators=8)

    def distance(self, weight: Tensor) -> Tensor:
        """`residual`, or something within a few per cent of it that costs products alone."""
        return self.residual(weight)


def check_radius(manifold: Manifold, radius: float) -> None:
    """Refuse a radius of a manifold that is not positive."""
    if not radius > 0:
        raise ValueError(
            f"radius of the {type(manifold).__name__} manifold must be positive, got {radius}"
        )
