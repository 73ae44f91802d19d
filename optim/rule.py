"""How one matrix is stepped: momentum x norm x manifold, with a radius and a decay."""

from dataclasses import dataclass, field

from torch import Tensor

from geon.errors import UsageError
from geon.optim.manifolds import Euclidean, Manifold
from geon.optim.norms import Norm, Reach, Spectral
from geon.optim.solvers import Solver, steepest


@dataclass(frozen=True)
class Rule:
    """weight <- retract((1 - lr * decay) weight - lr * radius * direction).

    direction = argmax <momentum, D>, norm(D) <= 1, D tangent at the weight. With the names of the
    field: Muon = Spectral x Euclidean; unconstrained Scion = any norm x Euclidean, decay 0;
    Scion = the same with decay 1 (a Frank-Wolfe step in the ball of this radius);
    Manifold Muon = Spectral x Stiefel, where lr is the angle of rotation.

    Attributes:
        norm: in which the step is steepest.
        manifold: on which the weight stays.
        momentum: fraction of the average kept at each step.
        nesterov: look ahead: average the gradient in once more before the direction is taken.
        radius: norm of the step at lr 1; on a manifold, the norm of the weight itself.
        decay: decoupled weight decay, per unit of lr.
    """

    norm: Norm
    manifold: Manifold = field(default_factory=Euclidean)
    momentum: float = 0.95
    nesterov: bool = False
    radius: float = 1.0
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.decay and self.manifold.constrains:
            raise UsageError(
                f"weight decay {self.decay} on {type(self.manifold).__name__}: the decay is "
                "normal to the manifold and exactly removed by the tangent projection; "
                "set weight_decay to 0, and choose the size of the weight by radius"
            )
        if not 0.0 <= self.momentum < 1.0:
            raise UsageError(f"momentum {self.momentum} is the fraction kept: it must be in [0, 1)")
        object.__setattr__(self, "_solver", steepest(self.norm, self.manifold))

    @property
    def needs_weight(self) -> bool:
        """Whether the direction depends on the weight (then both must be whole on a rank)."""
        return self.manifold.constrains

    @property
    def reach(self) -> Reach:
        """How much of a matrix must be whole on a rank."""
        return Reach.MATRIX if self.manifold.constrains else self.norm.reach

    @property
    def orthogonalizes(self) -> bool:
        """Whether a step takes a polar factor (counted in the log)."""
        return isinstance(self.norm, Spectral)

    def average(self, grad: Tensor, buffer: Tensor) -> Tensor:
        """Fold `grad` into `buffer` in place; return what the direction is taken of."""
        buffer.lerp_(grad, 1.0 - self.momentum)
        return grad.lerp(buffer, self.momentum) if self.nesterov else buffer

    def direction(
        self, update: Tensor, weight: Tensor | None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """Steepest direction for a batch of averaged gradients (..., d_out, d_in).

        weight: needed on a manifold. shape: of the logical matrix, when `update` is a shard.
        """
        if weight is None:
            return self.norm.lmo(update, shape)
        solver: Solver = self._solver  # type: ignore[attr-defined]
        return solver(update, weight)

    def move(self, weight: Tensor, direction: Tensor, lr: float) -> Tensor:
        """Weight after one step; exactly the same weight where the direction is zero and decay 0.

        The second half matters: a retraction of an unmoved weight would still round it.
        """
        moved = self.manifold.retract(
            (1.0 - lr * self.decay) * weight - (lr * self.radius) * direction, angle=lr
        )
        if not self.manifold.constrains:
            return moved
        still = (direction == 0).flatten(-2).all(dim=-1)[..., None, None]
        return weight.where(still, moved)

    def describe(self) -> str:
        """One line for tables."""
        parts = [f"{type(self.norm).__name__} x {type(self.manifold).__name__}"]
        parts.append(f"momentum {self.momentum:g}{' nesterov' if self.nesterov else ''}")
        parts.append(f"radius {self.radius:g}")
        if self.decay:
            parts.append(f"decay {self.decay:g}")
        return ", ".join(parts)
