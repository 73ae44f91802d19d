"""What a finish of a step must offer: something done to a direction before it moves the weight."""

from typing import ClassVar, NamedTuple

from torch import Tensor

from geon.optim.costs import Cost
from geon.optim.manifolds import Manifold
from geon.optim.norms import Norm, Reach


class Move(NamedTuple):
    """The move that a direction is about to make: weight - lr * (length * direction + decay * ...).

    Attributes:
        lr: learning rate of this step.
        length: factor on the direction at lr 1.
        decay: decoupled weight decay, per unit of lr.
        shape: of the whole matrix, when the tensors at hand are pieces of it.
        extent: Frobenius norm of a full direction of that shape.
    """

    lr: float
    length: float
    decay: float
    shape: tuple[int, int]
    extent: float


class Finish:
    """Changes directions (..., d_out, d_in), or the weights that they lead to.

    A finish is a frozen dataclass without tensors: state that it needs is declared, kept by the
    optimizer, and handed in. It returns new tensors and writes into none.

    Attributes:
        reach: how much of a matrix must be whole on a rank. A finish of ENTRY works on pieces, so
            at the end of the chain it runs where weights are written, and nothing is sent for it.
        needs_weight: whether it reads the weight. With a reach beyond ENTRY the weight then has to
            be whole beside the update.
        row_state: name of a number a row that it keeps from step to step; empty for none.
        keeps_tangent: whether tangent directions stay tangent, so that it may act on a manifold.
        decays: whether weight decay is its own; the rule then applies none.
    """

    reach: ClassVar[Reach] = Reach.ENTRY
    needs_weight: ClassVar[bool] = False
    row_state: ClassVar[str] = ""
    keeps_tangent: ClassVar[bool] = False
    decays: ClassVar[bool] = False

    @property
    def settles(self) -> bool:
        """Whether it changes weights after the step: then it needs them whole."""
        return type(self).settle is not Finish.settle

    def check(self, norm: Norm, manifold: Manifold, decay: float) -> None:
        """Refuse a rule that this finish does not go with.

        Raises:
            ValueError: says what it needs.
        """
        return

    def direct(self, direction: Tensor, weight: Tensor | None, move: Move) -> Tensor:
        """Return changed directions; called for a finish without a row state."""
        return direction

    def direct_with(self, direction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return changed directions and row states (..., d_out); for a finish with a row state."""
        return direction, rows

    def settle(self, weight: Tensor, moved: Tensor) -> Tensor:
        """Return changed weights after the step, given those before and after it."""
        return moved

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost for one matrix, rough: a pass for norms, one to apply them, and small kernels."""
        return Cost(words=6 * shape[0] * shape[1], operators=8)

    def describe(self) -> str:
        """Describe the finish in a few words, for tables."""
        return type(self).__name__
