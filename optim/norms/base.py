"""What a norm must offer: value, direction of steepest ascent, dual, extent, random point."""

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import ClassVar

from torch import Generator, Tensor

from geon.optim.costs import Cost
from geon.optim.linalg import inner


class Reach(IntEnum):
    """How much of a matrix must be whole on one rank: for an LMO, a finish, a whole rule."""

    ENTRY = 0
    ROW = 1
    MATRIX = 2


class Norm(ABC):
    """A norm on matrices (..., d_out, d_in) and steepest descent in it.

    The LMO is `argmax <grad, D> over value(D) <= 1`: the step is minus it. It is scale invariant,
    and zero for a zero gradient. `shape` is the shape of the logical matrix when the tensor at
    hand is only a shard of it, as `reach` allows.
    """

    reach: ClassVar[Reach] = Reach.MATRIX

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Norm of each matrix of the batch, (...)."""

    @abstractmethod
    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of steepest ascent: argmax <grad, D> over value(D) <= 1."""

    @abstractmethod
    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Draw a point of norm 1 (boundary initialisation)."""

    @abstractmethod
    def extent(self, shape: tuple[int, ...]) -> float:
        """Largest Frobenius norm on the unit sphere: that of an LMO direction of full support.

        lr * (Frobenius norm of the weight) / extent * lmo is then a step of angle lr, or less
        where a direction is shorter.
        """

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the largest <grad, D> over the unit ball, as the LMO attains it."""
        return inner(grad, self.lmo(grad))[..., 0, 0]

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of one LMO of a matrix of this shape; element-wise by default."""
        entries = shape[0] * shape[1]
        return Cost(fp32=4 * entries, words=10 * entries, operators=8)
