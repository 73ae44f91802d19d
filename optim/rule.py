"""How one matrix is stepped: momentum x norm x manifold x finishes x decay."""

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.costs import Cost
from geon.optim.finishes import FINISHES, EvenRows, Finish, Move, RowMoments
from geon.optim.manifolds import Euclidean, Manifold
from geon.optim.norms import Norm, Reach, RowWise, Spectral
from geon.optim.solvers import (
    GramForm,
    Ladder,
    RowForm,
    Solution,
    Solver,
    gram_form,
    steepest,
)


class Stepped(NamedTuple):
    """What a step of whole matrices gives.

    Attributes:
        result: directions (batch, d_out, d_in); new weights where the rule needs the weight.
        rows: the finishes' row states after the step, (batch, d_out) each.
        solution: of the solver, before the finishes.
    """

    result: Tensor
    rows: tuple[Tensor, ...]
    solution: Solution


@dataclass(frozen=True)
class Rule:
    """weight <- retract((1 - lr * decay) weight - lr * length * finish(direction)).

    direction = argmax <momentum, D>, norm(D) <= 1, D tangent at the weight. length is `radius` in
    Euclidean space; on a manifold it makes lr the angle by which a full direction turns the weight.
    The momentum is ambient: it is projected where it is used, never transported. With the names of
    the field:

    - Muon = Spectral x Euclidean, with decay; NorMuon = the same with RowMoments.
    - Unconstrained Scion = any norm x Euclidean. Scion = the same with decay 1: a Frank-Wolfe step
      in the ball of this radius.
    - SignSGD = Sign x Euclidean; normalized SGD = Frobenius x Euclidean.
    - Manifold Muon = Spectral x Stiefel. Hyperspherical descent = Frobenius x Hypersphere.
      MuonH = Spectral x FrobeniusSphere. Spectral sphere optimizer = Spectral x SpectralSphere.

    A rule is all there is to the mathematics of a step; transports ask it what must be whole where
    (`reach`, `needs_weight`, `row_states`), and whether sums would do (`gram_form`, `row_form`).

    Attributes:
        norm: in which the step is steepest.
        manifold: on which the weight stays.
        momentum: fraction of the average kept at each step.
        nesterov: look ahead: average the gradient in once more before the direction is taken.
        radius: norm of the step at lr 1 in Euclidean space; a manifold has a radius of its own.
        decay: decoupled weight decay, per unit of lr.
        ladder: which solver, for the spectral norm on Stiefel.
        finishes: what is done to a direction, one after the other.
        second_moment: short for RowMoments(second_moment) as the last finish; 0 for none.
        even_rows: short for EvenRows() as the last finish.
        compiled: let torch.compile make the code that finds directions of whole matrices, once for
            each rule and shape: fewer kernels, which round elsewhere.
    """

    norm: Norm
    manifold: Manifold = field(default_factory=Euclidean)
    momentum: float = 0.95
    nesterov: bool = False
    radius: float = 1.0
    decay: float = 0.0
    ladder: Ladder = field(default_factory=Ladder)
    finishes: tuple[Finish, ...] = ()
    second_moment: InitVar[float] = 0.0
    even_rows: InitVar[bool] = False
    compiled: bool = False

    def __post_init__(self, second_moment: float, even_rows: bool) -> None:
        finishes = tuple(self.finishes)
        try:
            if second_moment:
                finishes += (RowMoments(second_moment),)
            if even_rows:
                finishes += (EvenRows(),)
            object.__setattr__(self, "finishes", finishes)
            for finish in finishes:
                finish.check(self.norm, self.manifold, self.decay)
            self._check()
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._derive()

    def _derive(self) -> None:
        object.__setattr__(self, "_tail", _entrywise_from(self.finishes))
        settling = tuple(finish for finish in self.finishes if finish.settles)
        object.__setattr__(self, "_settling", settling)
        object.__setattr__(self, "_solver", steepest(self.norm, self.manifold, self.ladder))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._derive()

    def _check(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise UsageError(f"momentum {self.momentum} is the fraction kept: it must be in [0, 1)")
        if not 0.0 < self.radius < float("inf"):
            raise UsageError(f"radius {self.radius} must be finite and above 0")
        if not 0.0 <= self.decay < float("inf"):
            raise UsageError(f"weight_decay {self.decay} must be 0 or more")
        if self.decay and self.manifold.removes_decay:
            raise UsageError(
                f"weight decay {self.decay} on {type(self.manifold).__name__}: the weight is "
                "normal to the manifold, so the retraction removes the decay exactly; "
                "set weight_decay to 0, and choose the size of the weight by radius"
            )
        kinds = [type(finish) for finish in self.finishes]
        for finish in self.finishes:
            if kinds.count(type(finish)) > 1 or {RowMoments, EvenRows} <= set(kinds):
                raise UsageError(
                    "even_rows and second_moment both set the lengths of rows, and a finish acts "
                    f"once: keep one of {', '.join(f.describe() for f in self.finishes)}"
                )
            if not (finish.keeps_tangent or self.manifold.flat):
                name = next((k for k, v in FINISHES.items() if v is type(finish)), type(finish))
                raise UsageError(
                    f"finish {name} would turn directions off the tangent space of "
                    f"{type(self.manifold).__name__}: it needs manifold=euclidean or spectral_ball"
                )

    def adjusted(self, momentum: float, nesterov: bool, decay: float) -> "Rule":
        """The same rule with other numbers, as a param group has them at a step.

        Raises:
            UsageError: a number that the rule does not take.
        """
        rule = object.__new__(Rule)
        rule.__dict__.update(self.__dict__, momentum=momentum, nesterov=nesterov, decay=decay)
        rule._check()
        return rule

    # What a step needs, for the planner.

    @property
    def name(self) -> str:
        """Name of the rule: norm, manifold and row states. State fits rules of one name."""
        pair = f"{type(self.norm).__name__} x {type(self.manifold).__name__}"
        return " + ".join([pair, *self.row_states])

    @property
    def solver(self) -> Solver:
        """Solver of steepest descent for this norm and manifold."""
        solver: Solver = self._solver  # type: ignore[attr-defined]
        return solver

    @property
    def _head(self) -> tuple[Finish, ...]:
        """Finishes that act where directions are computed."""
        return self.finishes[: self._tail]  # type: ignore[attr-defined]

    @property
    def needs_weight(self) -> bool:
        """Whether the weight must be whole beside the update; the step then gives new weights."""
        return self.manifold.constrains or any(
            finish.needs_weight or finish.settles for finish in self._head
        )

    @property
    def reach(self) -> Reach:
        """How much of a matrix must be whole on a rank."""
        own = Reach.MATRIX if self.manifold.constrains else self.norm.reach
        return max([own, *(finish.reach for finish in self.finishes)])

    @property
    def row_states(self) -> tuple[str, ...]:
        """Names of the row states that the finishes keep: one number for each row."""
        return tuple(finish.row_state for finish in self.finishes if finish.row_state)

    @property
    def orthogonalizes(self) -> bool:
        """Whether a step takes a polar factor (counted in the log)."""
        return isinstance(self.norm, Spectral)

    def gram_form(self, shape: tuple[int, int]) -> GramForm | None:
        """The step of a matrix of this shape from sums over its long side, where there is one."""
        if self._head:  # a finish looks at rows, or at all of the direction: no sum has them
            return None
        return gram_form(self.norm, self.manifold, self.ladder, shape)

    @property
    def row_form(self) -> RowForm | None:
        """The step of pieces of rows from the lengths of whole rows, where that suffices."""
        if self._head or self.manifold.constrains or not isinstance(self.norm, RowWise):
            return None
        return RowForm(self.norm)

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of a whole step of a matrix of this shape on a kind of device.

        Beside direction, finishes and retraction: momenta, stacking and writing, in 11 words an
        entry, or 20 where weights are made whole and written back.
        """
        entries = shape[0] * shape[1]
        found = self.solver.cost(shape, device) + self.manifold.cost(shape, device)
        for finish in self.finishes:
            found += finish.cost(shape, device)
        if self.needs_weight:
            return found + Cost(words=20 * entries, operators=11)
        return found + Cost(words=11 * entries, operators=7)

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of a step of a matrix of this shape on a CPU."""
        return self.cost(shape).flops

    # The step.

    def average(self, grad: Tensor, buffer: Tensor) -> Tensor:
        """Fold `grad` into `buffer` in place; return what the direction is taken of."""
        return self.average_all([grad], [buffer])[0]

    def average_all(self, grads: Sequence[Tensor], buffers: Sequence[Tensor]) -> list[Tensor]:
        """Do what `average` does for many tensors of one dtype at once."""
        grads, buffers = list(grads), list(buffers)
        torch._foreach_lerp_(buffers, grads, 1.0 - self.momentum)
        return (
            list(torch._foreach_lerp(grads, buffers, self.momentum)) if self.nesterov else buffers
        )

    def solve(
        self, update: Tensor, weight: Tensor | None, shape: tuple[int, int] | None = None
    ) -> Solution:
        """Steepest direction for a batch of averaged gradients (..., d_out, d_in).

        weight: needed on a manifold. shape: of the logical matrix, when `update` is a shard.
        """
        solve = _compiled_solve() if self.compiled else _solve
        return solve(self, update, weight, shape)

    def step(
        self,
        update: Tensor,
        weight: Tensor | None,
        lr: float,
        shape: tuple[int, int],
        scale: float = 1.0,
        rows: Sequence[Tensor] = (),
    ) -> Stepped:
        """Directions, or new weights where the rule needs them, of a batch of matrices or pieces.

        A rule reads the size of a matrix off its shape, but a head's block has the size that it
        has in the whole matrix (`block_scale`). So the rule steps it in units of its scale: a
        direction is multiplied by it; a weight is divided by it before, and multiplied after.

        Shapes: update, weight (batch, rows, cols), of the matrix of `shape` or, as `reach` allows,
            pieces of it. rows: the finishes' states, (batch, d_out) each.
        """
        unit = weight if weight is None or scale == 1.0 else weight / scale
        solution = self.solve(update, unit, shape)
        move = self._move(shape, lr)
        if not self.needs_weight:
            direction, kept = _finish(self._head, solution.direction, None, rows, move)
            return Stepped(direction if scale == 1.0 else direction * scale, kept, solution)
        assert weight is not None and unit is not None
        direction, kept = _finish(self.finishes, solution.direction, unit, rows, move)
        moved = self.move(unit, direction, lr)
        for finish in self._settling:  # type: ignore[attr-defined]
            moved = finish.settle(unit, moved)
        if scale != 1.0:  # a weight that stays is not rounded
            scaled = moved * scale
            moved = scaled if self.decay else weight.where(moved == unit, scaled)
        return Stepped(moved, kept, solution)

    def length(self, shape: tuple[int, ...]) -> float:
        """Norm of the step at lr 1 for a matrix of this shape."""
        if not self.manifold.constrains:
            return self.radius
        return self.manifold.length(shape) / self.norm.extent(shape)

    def move(self, weight: Tensor, direction: Tensor, lr: float) -> Tensor:
        """Weight after one step; exactly the same weight where the direction is zero and decay 0.

        The second half matters: a retraction of an unmoved weight would still round it.
        """
        decay = self._own_decay
        step = lr * self.length(weight.shape)
        kept = (1.0 - lr * decay) * weight if decay else weight
        moved = torch.sub(kept, direction, alpha=step)
        if not self.manifold.constrains:
            return moved
        moved = self.manifold.retract(moved, lr)
        if decay:
            return moved
        still = (direction == 0).flatten(-2).all(dim=-1)[..., None, None]
        return weight.where(still, moved)

    def write(
        self,
        weights: Sequence[Tensor],
        results: Sequence[Tensor],
        lr: float,
        shape: tuple[int, int],
    ) -> None:
        """Take results, or pieces of them, into weights (rows, cols) in place; all at once.

        shape: of the matrices that these are pieces of.
        """
        if self.needs_weight:
            torch._foreach_copy_(list(weights), list(results))
            return
        if tail := self.finishes[len(self._head) :]:
            move = self._move(shape, lr)
            results = [
                _finish(tail, result, weight.float(), (), move)[0]
                for weight, result in zip(weights, results, strict=True)
            ]
        if weights[0].dtype != results[0].dtype:  # a step smaller than half a digit must not vanish
            for weight, result in zip(weights, results, strict=True):
                weight.copy_(self.move(weight.to(result.dtype), result, lr))
            return
        if decay := self._own_decay:
            torch._foreach_mul_(list(weights), 1.0 - lr * decay)
        torch._foreach_add_(list(weights), list(results), alpha=-lr * self.radius)

    @property
    def _own_decay(self) -> float:
        """Weight decay that no finish takes over."""
        return 0.0 if any(finish.decays for finish in self.finishes) else self.decay

    def _move(self, shape: tuple[int, int], lr: float) -> Move:
        return Move(lr, self.length(shape), self.decay, shape, self.norm.extent(shape))

    def describe(self) -> str:
        """Describe the rule in one line, for tables."""
        parts = [f"{type(self.norm).__name__} x {type(self.manifold).__name__}"]
        parts.append(f"momentum {self.momentum:g}{' nesterov' if self.nesterov else ''}")
        parts.append(f"radius {getattr(self.manifold, 'radius', self.radius):g}")
        if self.decay:
            parts.append(f"decay {self.decay:g}")
        parts += [finish.describe() for finish in self.finishes]
        if self.solver.name:
            parts.append(self.solver.name)
        if self.compiled:
            parts.append("compiled")
        return ", ".join(parts)


def _solve(
    rule: Rule, update: Tensor, weight: Tensor | None, shape: tuple[int, int] | None
) -> Solution:
    if not rule.manifold.constrains:
        return Solution(rule.norm.lmo(update, shape))
    assert weight is not None
    return rule.solver(update, weight)


@cache
def _compiled_solve() -> Callable[..., Solution]:
    """`_solve`, compiled for each rule and shape, of which models have more than torch admits."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 256)
    return torch.compile(_solve, dynamic=False)


def _entrywise_from(finishes: Sequence[Finish]) -> int:
    """Index in the chain at which the entry-wise finishes at its end begin."""
    at = len(finishes)
    while at and finishes[at - 1].reach is Reach.ENTRY and not finishes[at - 1].settles:
        at -= 1
    return at


def _finish(
    finishes: Sequence[Finish],
    direction: Tensor,
    weight: Tensor | None,
    rows: Sequence[Tensor],
    move: Move,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Change directions by a chain of finishes, which take their row states from `rows` in turn."""
    states, kept = iter(rows), []
    for finish in finishes:
        if finish.row_state:
            direction, state = finish.direct_with(direction, next(states))
            kept.append(state)
        else:
            direction = finish.direct(direction, weight, move)
    return direction, tuple(kept)
