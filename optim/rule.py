"""How one matrix is stepped: momentum x norm x manifold, with a radius and a decay."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.manifolds import Euclidean, Manifold
from geon.optim.norms import Norm, Reach, Spectral
from geon.optim.solvers import GramForm, Ladder, Solution, Solver, gram_form, steepest


@dataclass(frozen=True)
class Rule:
    """weight <- retract((1 - lr * decay) weight - lr * length * direction).

    direction = argmax <momentum, D>, norm(D) <= 1, D tangent at the weight. length is `radius` in
    Euclidean space; on a manifold it makes lr the angle by which a full direction turns the weight.
    The momentum is ambient: it is projected where it is used, never transported. With the names of
    the field:

    - Muon = Spectral x Euclidean, with decay; NorMuon = the same with second_moment.
    - Unconstrained Scion = any norm x Euclidean. Scion = the same with decay 1: a Frank-Wolfe step
      in the ball of this radius.
    - SignSGD = Sign x Euclidean; normalized SGD = Frobenius x Euclidean.
    - Manifold Muon = Spectral x Stiefel. Hyperspherical descent = Frobenius x Hypersphere.
      MuonH = Spectral x FrobeniusSphere. Spectral sphere optimizer = Spectral x SpectralSphere.

    Attributes:
        norm: in which the step is steepest.
        manifold: on which the weight stays.
        momentum: fraction of the average kept at each step.
        nesterov: look ahead: average the gradient in once more before the direction is taken.
        radius: norm of the step at lr 1 in Euclidean space; a manifold has a radius of its own.
        decay: decoupled weight decay, per unit of lr.
        ladder: which solver, for the spectral norm on Stiefel.
        second_moment: fraction kept of a running mean square of each row of the direction, by whose
            root the rows are divided (Z. Li et al., NorMuon, arXiv 2510.05491); 0 does nothing.
        even_rows: give all rows of the direction one length, without any state: what second_moment
            does when it keeps nothing.
    """

    norm: Norm
    manifold: Manifold = field(default_factory=Euclidean)
    momentum: float = 0.95
    nesterov: bool = False
    radius: float = 1.0
    decay: float = 0.0
    ladder: Ladder = field(default_factory=Ladder)
    second_moment: float = 0.0
    even_rows: bool = False

    def __post_init__(self) -> None:
        if self.decay and self.manifold.removes_decay:
            raise UsageError(
                f"weight decay {self.decay} on {type(self.manifold).__name__}: the weight is "
                "normal to the manifold, so the retraction removes the decay exactly; "
                "set weight_decay to 0, and choose the size of the weight by radius"
            )
        for name, kept in (("momentum", self.momentum), ("second_moment", self.second_moment)):
            if not 0.0 <= kept < 1.0:
                raise UsageError(f"{name} {kept} is the fraction kept: it must be in [0, 1)")
        if self.second_moment and not self._free_polar:
            raise UsageError(
                f"second_moment {self.second_moment} divides the rows of a polar factor: it needs "
                "norm=spectral and manifold=euclidean or spectral_ball, not "
                f"{type(self.norm).__name__} x {type(self.manifold).__name__}"
            )
        if self.even_rows and (self.second_moment or not self._free_polar):
            raise UsageError(
                "even_rows gives the rows of a polar factor one length: it needs norm=spectral, "
                "manifold=euclidean or spectral_ball, and second_moment 0, not "
                f"{type(self.norm).__name__} x {type(self.manifold).__name__} with second_moment "
                f"{self.second_moment}"
            )
        object.__setattr__(self, "_solver", steepest(self.norm, self.manifold, self.ladder))

    @property
    def solver(self) -> Solver:
        """Steepest descent for this norm and manifold."""
        solver: Solver = self._solver  # type: ignore[attr-defined]
        return solver

    @property
    def _free_polar(self) -> bool:
        """Whether directions are polar factors that no tangent space bends."""
        return self.manifold.flat and self.orthogonalizes

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

    def half_on(self, device: str) -> bool:
        """Whether most of a whole step is in bf16 on this kind of device."""
        return self.solver.half_on(torch.device(device))

    def gram_form(self, shape: tuple[int, int]) -> GramForm | None:
        """The step of a matrix of this shape from sums over its long side, where there is one."""
        return gram_form(self.norm, self.manifold, self.ladder, shape)

    def average(self, grad: Tensor, buffer: Tensor) -> Tensor:
        """Fold `grad` into `buffer` in place; return what the direction is taken of."""
        buffer.lerp_(grad, 1.0 - self.momentum)
        return grad.lerp(buffer, self.momentum) if self.nesterov else buffer

    def solve(
        self, update: Tensor, weight: Tensor | None, shape: tuple[int, int] | None = None
    ) -> Solution:
        """Steepest direction for a batch of averaged gradients (..., d_out, d_in).

        weight: needed on a manifold. shape: of the logical matrix, when `update` is a shard.
        """
        if weight is None:
            return Solution(self.norm.lmo(update, shape))
        return self.solver(update, weight)

    def length(self, shape: tuple[int, ...]) -> float:
        """Norm of the step at lr 1 for a matrix of this shape."""
        if not self.manifold.constrains:
            return self.radius
        return self.manifold.length(shape) / self.norm.extent(shape)

    def move(self, weight: Tensor, direction: Tensor, lr: float) -> Tensor:
        """Weight after one step; exactly the same weight where the direction is zero and decay 0.

        The second half matters: a retraction of an unmoved weight would still round it.
        """
        if not self.manifold.constrains:
            kept = (1.0 - lr * self.decay) * weight if self.decay else weight
            return torch.add(kept, direction, alpha=-lr * self.radius)
        step = lr * self.length(weight.shape)
        moved = self.manifold.retract((1.0 - lr * self.decay) * weight - step * direction, lr)
        if self.decay:
            return moved
        still = (direction == 0).flatten(-2).all(dim=-1)[..., None, None]
        return weight.where(still, moved)

    def move_(self, weight: Tensor, direction: Tensor, lr: float) -> None:
        """`move` in place, in Euclidean space; only fp32 weights can do without a copy."""
        if weight.dtype != direction.dtype:
            weight.copy_(self.move(weight, direction, lr))
            return
        if self.decay:
            weight.mul_(1.0 - lr * self.decay)
        weight.add_(direction, alpha=-lr * self.radius)

    def divide_rows(self, direction: Tensor, second: Tensor) -> Tensor:
        """NorMuon's step: divide rows by the root of their running mean square, keep ||D||_F.

        Shapes: direction (d_out, d_in) whole; second (d_out,), updated in place.
        """
        second.lerp_(direction.square().mean(dim=-1), 1.0 - self.second_moment)
        divided = direction / second.sqrt().clamp_min(1e-12).unsqueeze(-1)
        size = divided.norm()
        return divided * (direction.norm() / size.clamp_min(1e-30))

    def level_rows(self, direction: Tensor) -> Tensor:
        """Directions (..., d_out, d_in) whose rows have one length, and ||D||_F as before.

        A row that is zero stays zero.
        """
        lengths = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        mean = lengths.square().mean(dim=-2, keepdim=True).sqrt()
        return direction * (mean / lengths).where(lengths > 0, torch.zeros_like(lengths))

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of a direction and, on Stiefel, of one step of the retraction."""
        return self.solver.flops(shape) + self.manifold.flops(shape)

    def describe(self) -> str:
        """One line for tables."""
        parts = [f"{type(self.norm).__name__} x {type(self.manifold).__name__}"]
        parts.append(f"momentum {self.momentum:g}{' nesterov' if self.nesterov else ''}")
        parts.append(f"radius {getattr(self.manifold, 'radius', self.radius):g}")
        if self.decay:
            parts.append(f"decay {self.decay:g}")
        if self.even_rows:
            parts.append("even rows")
        if self.second_moment:
            parts.append(f"second moment {self.second_moment:g}")
        if self.solver.name:
            parts.append(self.solver.name)
        return ", ".join(parts)
