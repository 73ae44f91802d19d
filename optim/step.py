"""One step on this rank: who moves and by what gradients, and what the transports ask for."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import ExchangeError, UsageError
from geon.optim.entries import EntryRule
from geon.optim.readings import Readings
from geon.optim.rule import Rule
from geon.optim.shard import Job, Matrix, Piece, Ranks
from geon.optim.views import Form

WORK = torch.float32
"""Averages are taken, and weights gathered, in fp32 whatever dtype they rest in: bf16 cannot hold a
manifold better than 4e-3, and loses most of a small step to rounding."""


NONFINITE = ("raise", "skip", "ignore")
"""What a gradient with nan or infinity does; see `HybridOptimizer`."""


def check_lr(lr: Any, where: str) -> float:
    """Return a learning rate as a float.

    Raises:
        UsageError: not finite, or negative.
    """
    value = float(lr)
    if not 0.0 <= value < math.inf:
        raise UsageError(f"{where}: lr {value} must be finite and 0 or more")
    return value


def check_begun(begun: bool) -> None:
    """Refuse a first step without any gradient among several ranks.

    Raises:
        UsageError: says what replaces parameters.
    """
    if not begun and dist.is_available() and dist.is_initialized():
        raise UsageError(
            "no parameter of the optimizer has a gradient in its first step: fully_shard, "
            "parallelize_module and their like replace a model's parameters; make the optimizer "
            "after them, or put the new parameters into its param_groups"
        )


def check_policies(nonfinite: str, max_norm: float, placed_twice: bool) -> None:
    """Refuse words and numbers that a step could not follow.

    Raises:
        UsageError: names the value.
    """
    if nonfinite not in NONFINITE:
        raise UsageError(f"nonfinite '{nonfinite}' is not one of {', '.join(NONFINITE)}")
    if not 0.0 <= max_norm < math.inf:
        raise UsageError(f"max_norm {max_norm} must be finite and 0 or more")
    if placed_twice:
        raise UsageError("mesh and placement both say which ranks step together: give one of them")


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def grad_of(param: Tensor) -> Tensor:
    """This rank's piece of a gradient, laid out like its parameter; a sparse one made dense."""
    grad: Any = param.grad
    if grad.is_sparse:
        return grad.to_dense()
    placements = getattr(param, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    return local(grad).contiguous()


def view(stored: Tensor, piece: Piece) -> Tensor:
    """A piece of a rank's contiguous storage as a matrix; no copy."""
    offset = stored.storage_offset() + piece.offset
    return stored.as_strided(piece.region.shape, (piece.stride, 1), offset)


def signature(param: Any) -> tuple[Any, ...]:
    """What a plan depends on in how a parameter lies; when it changes, a new plan is needed."""
    place = (param.shape, param.dtype, param.device, param.requires_grad)
    if hasattr(param, "placements"):
        return (*place, param.placements, param.device_mesh)
    return place


class Verdict(Enum):
    """Whether a step is taken: yes, no as there is nothing to do, or no as it is not finite."""

    GO = "go"
    STILL = "still"
    SKIP = "skip"


@dataclass
class Active:
    """A param group's parameters that are stepped now.

    Attributes:
        rule: with the numbers that the group holds now.
        grads: this rank's pieces, of each parameter.
        coasting: parameters without a gradient that are stepped all the same.
    """

    group: dict[str, Any]
    rule: Rule | EntryRule
    names: list[str] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    coasting: list[tuple[str, Tensor]] = field(default_factory=list)

    def collect(self) -> None:
        """Collect the parameters of the group that have a gradient, and those that coast."""
        group = self.group
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if param.requires_grad and param.grad is not None:
                self.names.append(name)
                self.params.append(param)
                self.grads.append(grad_of(param))
            elif param.requires_grad and group.get("idle") == "coast":
                self.coasting.append((name, param))


def rule_now(
    group: dict[str, Any], rule: Rule | EntryRule, known: dict[str, Rule]
) -> Rule | EntryRule:
    """A group's rule with the numbers that the group holds now.

    known: the rule that was made last, by group.

    Raises:
        UsageError: names the group and the number that is out of range.
    """
    name = group["name"]
    check_lr(group["lr"], f"group '{name}'")
    try:
        if not isinstance(rule, Rule):
            if "momentum" in group and "betas" in group:  # a scheduler cycles it
                group["betas"] = (group.pop("momentum"), *group["betas"][1:])
            rule.check(group)
            return rule
        numbers = group["momentum"], group["nesterov"], group["weight_decay"]
        last = known.get(name)
        if last is None or (last.momentum, last.nesterov, last.decay) != numbers:
            last = known[name] = rule.adjusted(*numbers)
        return last
    except UsageError as error:
        raise UsageError(f"group '{name}': {error}") from None


def verdict(active: Sequence[Active], nonfinite: str, ranks: Ranks) -> Verdict:
    """Whether a step is to be taken: all ranks agree. Waits for the device, and sends one number.

    Not where every rate and gradient is zero: so state is made by torch.distributed.checkpoint.

    nonfinite: raise, skip or ignore.

    Raises:
        FloatingPointError: a gradient that is not finite, where that is to be raised.
    """
    still = all(float(one.group["lr"]) == 0.0 for one in active)
    if nonfinite == "ignore" and not still:
        return Verdict.GO
    named = [
        (name, grad)
        for one in active
        for name, grad in zip(one.names, one.grads, strict=True)
        if grad.numel()
    ]
    norms = torch._foreach_norm([grad for _, grad in named]) if named else []
    values = torch.stack([norm.float() for norm in norms]).tolist() if named else []
    pairs = list(zip(named, values, strict=True))
    # A norm of finite entries may overflow, and one of tiny entries may be 0: look again there.
    odd = [(name, grad) for (name, grad), norm in pairs if not math.isfinite(norm)]
    bad = [name for name, grad in odd if not bool(grad.isfinite().all())]
    largest = max((norm for norm in values if math.isfinite(norm)), default=float(bool(odd)))
    if still and largest == 0.0:
        largest = float(any(bool(grad.any()) for _, grad in named))
    largest = math.inf if bad else largest
    if ranks.group is not None:
        largest = _reduced(torch.tensor(largest, device=ranks.device), "MAX", ranks).item()
    if math.isfinite(largest) or nonfinite == "ignore":
        return Verdict.STILL if still and largest == 0.0 else Verdict.GO
    if nonfinite == "skip":
        return Verdict.SKIP
    where = f"of '{bad[0]}' and {len(bad) - 1} more" if bad else "on another rank"
    raise FloatingPointError(
        f"a gradient {where} is not finite: nothing was stepped, weights and state are as they "
        "were. Lower the learning rate, or set HybridOptimizer(nonfinite='skip') "
        "(optim.nonfinite=skip) to leave out such steps"
    )


def _reduced(number: Tensor, operation: str, ranks: Ranks) -> Tensor:
    """A number over all ranks, in place.

    Raises:
        ExchangeError: another rank is gone.
    """
    try:
        dist.all_reduce(number, getattr(dist.ReduceOp, operation), ranks.group)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {ranks.rank}: the reduction of gradient norms (all_reduce) failed: another rank "
            f"ended, or took longer than parallel.timeout_seconds. {str(error).splitlines()[0]}"
        ) from error
    return number


def clip(
    active: Sequence[Active], max_norm: float, copies: Mapping[str, int], ranks: Ranks
) -> Tensor:
    """Clip gradients to a global 2-norm in place; return the norm before.

    Exact whatever meshes the parameters lie on: each square is divided by the number of ranks that
    hold a copy, and one sum goes over all ranks.
    """
    pairs = [pair for one in active for pair in zip(one.names, one.grads, strict=True)]
    squares = [grad.float().square().sum() / copies[name] for name, grad in pairs]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=ranks.device)
    norm = (total if ranks.group is None else _reduced(total, "SUM", ranks)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in pairs:
        grad.mul_(scale)
    return norm


_Alike = tuple[str, tuple[int, int], torch.dtype]
"""Route, shape and dtype of weights that are written together."""


class Step:
    """Averaged gradients, weights and states of one step; see `geon.optim.shard.Work`.

    Attributes:
        updates: averaged gradients by parameter, this rank's pieces, contiguous, fp32.
        weights: weights by parameter, this rank's pieces, in their own dtype; written in place.
        moving: parameters that are stepped: only these are written.
        rules: by route, with the numbers of this step.
        lrs: by route; a route at 0 is not written.
    """

    def __init__(self, rank: int, alone: bool, readings: Readings) -> None:
        self.rank, self.alone = rank, alone
        self.updates: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.moving: set[str] = set()
        self.rules: dict[str, Rule] = {}
        self.lrs: dict[str, float] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._wide: dict[str, Tensor] = {}
        self._readings = readings

    def fold(self, one: Active, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Fold the gradients of a steepest group into its momenta.

        What has no gradient travels with its bucket, is not averaged and will not be written.
        """
        group, rule = one.group, one.rule
        assert isinstance(rule, Rule)
        self.rules[group["name"]], self.lrs[group["name"]] = rule, float(group["lr"])
        held = [local(state[param]["momentum"]) for param in one.params]
        grads = [grad if grad.dtype == WORK else grad.to(WORK) for grad in one.grads]
        for _, param in one.coasting:
            held.append(local(state[param]["momentum"]))
            grads.append(torch.zeros_like(held[-1], dtype=WORK))
        names = [*one.names, *(name for name, _ in one.coasting)]
        if names:
            buffers = [buffer.to(WORK) for buffer in held]  # the same tensors where they are fp32
            found = rule.average_all(grads, buffers)
            if held[0].dtype != WORK:
                torch._foreach_copy_(held, buffers)
            self.updates.update(zip(names, found, strict=True))
            self.moving.update(names)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if not param.requires_grad:
                continue
            self.weights[name] = local(param)
            if name not in self.updates:
                self.updates[name] = local(state[param]["momentum"]).to(WORK)
            if rule.row_states:
                self._rows[name] = [state[param][key] for key in rule.row_states]

    def moves(self, matrix: Matrix) -> bool:
        """Whether the matrix has a gradient."""
        return matrix.param in self.moving

    def operand(self, matrix: Matrix, index: int, piece: Piece) -> Tensor:
        """A piece of the matrix's update (0) or weight (1), in fp32."""
        if index == 0:
            return view(self.updates[matrix.param], piece)
        stored = self.weights[matrix.param]
        if stored.dtype != WORK:
            if matrix.param not in self._wide:
                self._wide[matrix.param] = stored.to(WORK)
            stored = self._wide[matrix.param]
        return view(stored, piece)

    def row_states(self, matrix: Matrix) -> list[Tensor]:
        """The finishes' numbers for the rows of a matrix, views."""
        return [state.view(-1)[slice(*matrix.states)] for state in self._rows.get(matrix.param, ())]

    def set_row_states(self, matrix: Matrix, states: Sequence[Tensor]) -> None:
        """Take row states that another rank has computed."""
        if self.moves(matrix):
            for own, new in zip(self.row_states(matrix), states, strict=True):
                own.copy_(new)

    def solve(self, jobs: Sequence[Job], operands: Sequence[Tensor]) -> Tensor:
        """Directions, or new weights, of a batch by its rule; row states are written."""
        matrix = jobs[0].matrix
        own = [self.row_states(job.matrix) for job in jobs] if matrix.row_states else []
        rows = [torch.stack(states) for states in zip(*own, strict=True)]
        if matrix.plain:
            result, kept = self._solve(jobs, matrix.forms[0], operands, rows)
        else:
            opened = zip(*(matrix.view.open(operand) for operand in operands), strict=True)
            cuts = [form.count * form.shape[0] for form in matrix.forms]
            cut = zip(*(torch.split(state, cuts, dim=1) for state in rows), strict=True)
            parts = [
                self._solve(jobs, form, whole, [s.reshape(-1, form.shape[0]) for s in states])
                for form, whole, states in zip(
                    matrix.forms, opened, cut if rows else repeat(()), strict=False
                )
            ]
            result = matrix.view.close([part for part, _ in parts], matrix.shape)
            kept = tuple(
                torch.cat([state.reshape(len(jobs), -1) for state in states], dim=1)
                for states in zip(*(states for _, states in parts), strict=True)
            )
        for k, new in enumerate(kept):
            pairs = zip(jobs, own, new.unbind(), strict=True)
            taken = [(states[k], one) for job, states, one in pairs if self.moves(job.matrix)]
            if taken:
                torch._foreach_copy_([old for old, _ in taken], [one for _, one in taken])
        return result

    def _solve(
        self, jobs: Sequence[Job], form: Form, operands: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Results and row states of matrices of one form: (batch count, d_out, d_in)."""
        matrix = jobs[0].matrix
        rule, lr = self.rules[matrix.route], self.lrs[matrix.route]
        update, weight = operands[0], operands[1] if len(operands) == 2 else None
        result, kept, solution = rule.step(update, weight, lr, form.shape, matrix.scale, rows)
        if weight is not None and (self._readings.wanted or solution.fell_back is not None):
            # Where several ranks compute the same, its owner takes note of it.
            owned = [i for i, job in enumerate(jobs) if job.owner == self.rank]
            which = [i * form.count + k for i in owned for k in range(form.count)]
            unit = weight if matrix.scale == 1.0 else weight / matrix.scale
            if which:
                self._readings.take(rule, update, unit, solution, which)
        return result, kept

    def write(self, results: Iterable[tuple[Matrix, Piece, Tensor]]) -> None:
        """Move weights by pieces of directions, or replace them; alike ones at once."""
        alike: dict[_Alike, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for matrix, piece, result in results:
            if self.moves(matrix) and self.lrs[matrix.route] != 0.0:
                stored = self.weights[matrix.param]
                key = matrix.route, matrix.forms[0].shape, stored.dtype
                alike[key].append((view(stored, piece), result))
        for (route, shape, _), pairs in alike.items():
            weights, found = zip(*pairs, strict=True)
            self.rules[route].write(weights, found, self.lrs[route], shape)

    def lr(self, matrix: Matrix) -> float:
        """Learning rate of the matrix's route."""
        return self.lrs[matrix.route]

    def gram_form(self, matrix: Matrix) -> Any:
        """The step of the matrix from sums over its long side."""
        return self.rules[matrix.route].gram_form(matrix.shape)

    def row_form(self, matrix: Matrix) -> Any:
        """The step of the matrix's rows from their lengths."""
        return self.rules[matrix.route].row_form

    def count_fallbacks(self, fell_back: Tensor) -> None:
        """Count matrices that a cheaper solver stood in for."""
        self._readings.count(fell_back)
