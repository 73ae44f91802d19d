"""One step on this rank: who moves and by what gradients, and what the transports ask for."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.entries import EntryRule
from geon.optim.health import (
    ENTRY_LIMIT,
    KINDS,
    Watch,
    bad_number,
    cut_down,
    examined,
    reduced,
    spikes,
)
from geon.optim.readings import Readings
from geon.optim.rounding import DRAWS, Box, round_by_chance
from geon.optim.rule import Rule
from geon.optim.shard import Job, Layout, Matrix, Piece, Ranks
from geon.optim.views import Form

WORK = torch.float32
"""Averages are taken, and weights gathered, in fp32 whatever dtype they rest in: bf16 cannot hold a
manifold better than 4e-3, and loses most of a small step to rounding."""


def check_lr(lr: Any, where: str, rule: Rule | EntryRule) -> float:
    """Return a learning rate as a float.

    Raises:
        UsageError: not finite, negative, or an angle that no retraction brings back.
    """
    value = float(lr)
    if not 0.0 <= value < math.inf:
        raise UsageError(f"{where}: lr {value} must be finite and 0 or more")
    if isinstance(rule, Rule) and not rule.manifold.flat and value > rule.manifold.most_angle:
        raise UsageError(
            f"{where}: lr {value:g} is an angle on {type(rule.manifold).__name__}, in radians: it "
            f"must be at most {rule.manifold.most_angle:g} (a turn is 6.3)"
        )
    return value


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
    check_lr(group["lr"], f"group '{name}'", rule)
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


def glance(
    watch: Watch, active: Iterable[Active], state: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    """Have the next `judge` ask whether weights and state of a step, counters apart, are finite."""
    watch.held = [
        (name, key, own)
        for one in active
        for name, param in (*zip(one.names, one.params, strict=True), *one.coasting)
        for key, tensor in {"weight": param, **state.get(param, {})}.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim
        if (own := local(tensor)).numel()
    ]
    alike = defaultdict(list)
    for _, _, own in watch.held:
        alike[own.dtype].append(own)
    norms = [torch.stack(torch._foreach_norm(some)).float() for some in alike.values()]
    watch.pending = torch.cat(norms).sum() if norms else None


def judge(
    active: Sequence[Active],
    watch: Watch,
    nonfinite: str,
    clips: bool,
    ranks: Ranks,
    copies: Mapping[str, int],
) -> Verdict:
    """Whether a step is to be taken: all ranks agree. Waits for the device, and sends one message.

    Not where every rate and gradient is zero: so state is made by torch.distributed.checkpoint.
    Gradients that are spikes (`Watch.spike`) are cut down in place.

    nonfinite: raise, skip or ignore. clips: whether entry rules clip their gradients.
    copies: by parameter, ranks that hold the same piece as this one; alike on all ranks in order.

    Raises:
        BadNumber: a gradient or a loss that is not finite, where that is to be raised; weights or
            state that the last step left so, always.
    """
    still = all(float(one.group["lr"]) == 0.0 for one in active)
    beside = {"loss": watch.loss, "update": watch.pending}
    watch.loss = watch.pending = None
    if nonfinite == "ignore" and not still:
        return Verdict.GO
    pairs = [pair for one in active for pair in zip(one.names, one.grads, strict=True)]
    named = [(name, grad) for name, grad in pairs if grad.numel()]
    norms = list(torch._foreach_norm([grad for _, grad in named])) if named else []
    norms += [number for number in beside.values() if number is not None]
    values = torch.stack([norm.float() for norm in norms]).tolist() if norms else []
    told = {kind: values.pop() for kind in ("update", "loss") if beside[kind] is not None}
    where: dict[str, str] = {}
    if not all(value < ENTRY_LIMIT for value in (*values, *told.values())):
        entries = [one for one in active if isinstance(one.rule, EntryRule) and not clips]
        squared = {name for one in entries for name in one.names}
        values, where = examined(named, values, told, squared, watch)
    own = {name: norm for (name, _), norm in zip(named, values, strict=True)}
    moves = any(values) or bool(where) or (still and any(bool(g.any()) for _, g in named))
    sums = [float(moves), *(float(kind in where) for kind in KINDS)]
    if watch.spike:
        sums += [own.get(name, 0.0) ** 2 / shares for name, shares in copies.items()]
    if ranks.group is not None:
        sent = torch.tensor(sums, dtype=torch.float64, device=ranks.device)
        sums = reduced(sent, "SUM", ranks).tolist()
    for kind, count in zip(KINDS, sums[1:], strict=False):
        if count and nonfinite != "ignore":
            if nonfinite == "skip" and kind != "update":
                return Verdict.SKIP
            raise bad_number(kind, where.get(kind, ""))
    if still and not sums[0]:
        return Verdict.STILL
    if watch.spike and active:
        cut = spikes(watch, dict(zip(copies, sums[1 + len(KINDS) :], strict=True)))
        for name, grad in named:
            if name in cut:
                cut_down(grad, cut[name])
    return Verdict.GO


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

    def __init__(
        self, rank: int, alone: bool, readings: Readings, layouts: Mapping[str, Layout]
    ) -> None:
        self.rank, self.alone, self._layouts = rank, alone, layouts
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
            buffers = held
            if held[0].dtype != WORK:
                buffers = [torch.empty_like(own, dtype=WORK) for own in held]
                torch._foreach_copy_(buffers, held)
            found = rule.average_all(grads, buffers)
            if held[0].dtype != WORK:
                params = [*one.params, *(param for _, param in one.coasting)]
                draws = [state[param][DRAWS] for param in params]
                self._rest(dict(zip(names, draws, strict=True)), held, buffers)
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

    def _rest(
        self, draws: Mapping[str, Tensor], held: Sequence[Tensor], averages: Sequence[Tensor]
    ) -> None:
        """Leave averages in momenta that rest in bf16."""
        round_by_chance(
            [
                Box(count, piece.region, view(average, piece), view(own, piece))
                for (name, count), own, average in zip(draws.items(), held, averages, strict=True)
                for piece in self._layouts[name].pieces(self.rank)
            ]
        )
        torch._foreach_add_(list(draws.values()), 1)  # alike on ranks that hold none of it

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
