"""What a solver returns, and what it must offer."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from geon.optim.costs import Cost


class Solution(NamedTuple):
    """A direction for each matrix of a batch.

    Attributes:
        direction: argmax <grad, A> over tangent A of norm at most 1, of the gradient's shape.
        fell_back: (batch,) bool, where a cheaper solver had to stand in; None when none can.
    """

    direction: Tensor
    fell_back: Tensor | None = None


class Solver(ABC):
    """Steepest descent for one pair (norm, manifold), on batches (..., d_out, d_in) as stored.

    No solver reads a value back from the device: a step never waits for the host.
    """

    @property
    def name(self) -> str:
        """Name of the solver in tables, where a pair has more than one."""
        return ""

    @abstractmethod
    def __call__(self, grad: Tensor, weight: Tensor) -> Solution:
        """Directions of norm 1 for a batch of gradients; zero for a zero gradient."""

    @abstractmethod
    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of one direction for a matrix of this shape on a kind of device."""

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of one direction on a CPU, every pass of bf16x3 counted."""
        return self.cost(shape).flops

    def inspect(self, grad: Tensor, weight: Tensor, direction: Tensor) -> dict[str, Tensor]:
        """Readings of one step for the log, (batch,) each; slow, taken every so many steps."""
        return {}
