"""One torch optimizer whose param groups each carry their rule."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geon.errors import UsageError
from geon.optim.adamw import AdamW
from geon.optim.polar import ieee_products
from geon.optim.readings import Readings
from geon.optim.roles import Block, ParamInfo
from geon.optim.router import check_partition
from geon.optim.rule import Rule
from geon.optim.shard import Exchange, Layout, Matrix, Plan, Region, locate, make_plan

# Momenta, gathered weights and directions are fp32 whatever the weights are: bf16 cannot hold a
# manifold better than 4e-3, and loses most of a small step to rounding.
_WIRE = torch.float32


@dataclass
class Group:
    """A route's parameters with their rule and peak learning rate.

    per_head: step each attention head's block as a matrix of its own; parameters without heads are
    stepped whole.
    """

    name: str
    rule: Rule | AdamW
    lr: float
    params: list[tuple[ParamInfo, nn.Parameter]]
    per_head: bool = False

    def __post_init__(self) -> None:
        check_per_head(self.rule, self.per_head, f"group '{self.name}'")

    def describe(self) -> str:
        """One line for tables."""
        return self.rule.describe() + (", per head" if self.per_head else "")


class HybridOptimizer(torch.optim.Optimizer):
    """Steps each param group by its rule: steepest rules on whole matrices, AdamW on entries.

    Param groups are `{"params", "names", "name", "rule", "lr"}`; "rule" is the rule's description,
    so that `state_dict()` holds plain values only. State exists from construction on, like the
    parameters (a DTensor's state is a DTensor): {"momentum"} for steepest rules, torch's own keys
    for AdamW. A group whose lr is 0 is frozen: its weights, momenta and counters stay as they are.
    `readings` tells how good the directions of the last step were, where it was asked to look.

    Every rank must call `step()`: on sharded matrices it runs the collectives of `plan`. A
    parameter without a gradient counts as one with a zero gradient in a steepest group (its
    momentum still moves it), and is left alone in an AdamW group.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        max_buffer_mb: float = 64.0,
    ) -> None:
        self.rules = {g.name: g.rule for g in groups}
        self._per_head = {g.name: g.per_head for g in groups}
        self._infos = {info.name: info for g in groups for info, _ in g.params}
        super().__init__(
            [
                {
                    "params": [p for _, p in g.params],
                    "names": [info.name for info, _ in g.params],
                    "name": g.name,
                    "rule": g.describe(),
                    "lr": g.lr,
                    "peak_lr": g.lr,
                }
                for g in groups
                if g.params
            ],
            {},
        )
        check_partition(self._infos, [group["names"] for group in self.param_groups])
        self._params = dict(self.named_parameters())
        self.readings = Readings()
        self._exchange = self._make_exchange(max_buffer_mb)
        for group in self.param_groups:
            rule = self.rules[group["name"]]
            for name, param in zip(group["names"], group["params"], strict=True):
                if isinstance(rule, AdamW):
                    self.state[param] = rule.new_state(param)
                else:
                    self.state[param] = {"momentum": torch.zeros_like(param, dtype=_WIRE)}
                    if rule.second_moment:
                        # One number a row, whole on every rank whatever the layout; heads that own
                        # columns have a row each of these.
                        blocks = self._infos[name].blocks(self._per_head[group["name"]])
                        columns, rows = len({block.cols for block in blocks}), param.shape[0]
                        shape = (rows,) if columns == 1 else (columns, rows)
                        second = torch.zeros(shape, dtype=_WIRE, device=param.device)
                        self.state[param]["second_moment"] = second

    @property
    def plan(self) -> Plan:
        """What a step sends and computes."""
        return self._exchange.plan

    @property
    def exchange(self) -> Exchange:
        """The exchange, with its counters."""
        return self._exchange

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """All parameters with their names, group by group."""
        for group in self.param_groups:
            yield from zip(group["names"], group["params"], strict=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter>.<key>": what a checkpoint holds of the optimizer."""
        return {
            f"{name}.{key}": tensor
            for name, param in self.named_parameters()
            for key, tensor in self.state[param].items()
        }

    def set_lr(self, fraction: float) -> None:
        """Set every group to this fraction of its peak learning rate."""
        for group in self.param_groups:
            group["lr"] = fraction * group["peak_lr"]

    def _make_exchange(self, max_buffer_mb: float) -> Exchange:
        matrices: list[Matrix] = []
        groups: dict[str, dist.ProcessGroup | None] = {"": None}
        for group in self.param_groups:
            rule = self.rules[group["name"]]
            if isinstance(rule, AdamW):
                continue
            for name, param in zip(group["names"], group["params"], strict=True):
                layout, key, process_group = locate(name, param)
                groups[key] = process_group
                info, per_head = self._infos[name], self._per_head[group["name"]]
                matrices += matrices_of(info, group["name"], rule, layout, key, per_head)
        return Exchange(make_plan(matrices, max_buffer_mb), groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one step to every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates: dict[str, Tensor] = {}
        lrs: dict[str, float] = {}
        for group in self.param_groups:
            rule, lr = self.rules[group["name"]], float(group["lr"])
            lrs[group["name"]] = lr
            if isinstance(rule, AdamW):
                if lr != 0.0:
                    self._step_entries(group, rule, lr)
                continue
            for name, param in zip(group["names"], group["params"], strict=True):
                buffer = _local(self.state[param]["momentum"])
                if lr != 0.0 and param.grad is not None:
                    updates[name] = rule.average(_local(param.grad).to(_WIRE), buffer)
                else:
                    if lr != 0.0:
                        buffer.mul_(rule.momentum)
                    updates[name] = buffer
        with ieee_products():
            self._step_matrices(updates, lrs)
        self.readings.close()
        return loss

    def _step_entries(self, group: dict[str, Any], rule: AdamW, lr: float) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            rule.step(
                [_local(p) for p in params],
                [_local(p.grad) for p in params],
                [{k: _local(v) for k, v in self.state[p].items()} for p in params],
                lr,
            )

    def _step_matrices(self, updates: dict[str, Tensor], lrs: dict[str, float]) -> None:
        """Exchange updates (and weights, on a manifold), and write the new weights."""
        ranks = {m.param: self._exchange.rank_in(m.group) for m, _ in self.plan.matrices}

        def piece(matrix: Matrix, tensor: Tensor) -> Tensor:
            place = matrix.local(ranks[matrix.param])
            return (tensor if tensor.dim() == 2 else tensor.view(1, -1))[place.slices]

        def operands(matrix: Matrix) -> tuple[Tensor, ...]:
            update = piece(matrix, updates[matrix.param])
            if matrix.operands == 1:
                return (update,)
            return update, piece(matrix, _local(self._params[matrix.param])).to(_WIRE)

        def compute(matrix: Matrix, tensors: tuple[Tensor, ...]) -> Tensor:
            # A rule reads the size of a matrix off its shape, but a head's block has the size that
            # it has in the whole matrix (block_scale). So the rule steps it in units of its scale:
            # a step alone is multiplied by it; a weight is divided by it before, and multiplied
            # after. This is the only place of a step that knows of scales.
            rule, scale = self._rule(matrix), matrix.scale
            if matrix.operands == 1:
                direction = rule.solve(tensors[0], None, matrix.shape).direction
                return direction if scale == 1.0 else direction * scale
            update, weight = tensors
            unit = weight if scale == 1.0 else weight / scale
            solution = rule.solve(update, unit)
            self.readings.take(rule, update, unit, solution)
            moved = rule.move(unit, solution.direction, lrs[matrix.rule])
            # Back and forth would round a weight that did not move.
            return moved if scale == 1.0 else weight.where(moved == unit, moved * scale)

        def finish(matrix: Matrix, result: Tensor) -> Tensor:
            rule = self._rule(matrix)
            if not rule.second_moment or lrs[matrix.rule] == 0.0:
                return result
            second = self.state[self._params[matrix.param]]["second_moment"]
            if second.dim() == 2:
                second = second[matrix.box.cols[0] // matrix.shape[1]]
            return rule.divide_rows(result, second[slice(*matrix.box.rows)])

        def write(matrix: Matrix, result: Tensor) -> None:
            lr = lrs[matrix.rule]
            if lr == 0.0:
                return
            weight = piece(matrix, _local(self._params[matrix.param]))
            if matrix.operands == 1:
                result = self._rule(matrix).move(weight, result, lr)
            weight.copy_(result)

        self._exchange.run(operands, compute, finish, write)

    def _rule(self, matrix: Matrix) -> Rule:
        rule = self.rules[matrix.rule]
        assert isinstance(rule, Rule)
        return rule

    @torch.no_grad()
    def clip_entries_(self, max_norm: float) -> float | None:
        """Clip the gradients of element-wise groups to a global 2-norm; return the norm before.

        Steepest directions are scale invariant, so only AdamW groups are clipped. The norm is
        exact when parameters are sharded over different groups: squares are summed per group.
        Returns None when no group is element-wise.
        """
        grads = [
            (name, param)
            for group in self.param_groups
            if isinstance(self.rules[group["name"]], AdamW)
            for name, param in zip(group["names"], group["params"], strict=True)
            if param.grad is not None
        ]
        if not grads:
            return None
        squares: dict[str, Tensor] = {}
        groups: dict[str, dist.ProcessGroup | None] = {}
        for name, param in grads:
            assert param.grad is not None
            _, key, groups[key] = locate(name, param)
            square = _local(param.grad).float().square().sum()
            squares[key] = squares[key] + square if key in squares else square
        for key, group in groups.items():
            if group is not None:
                dist.all_reduce(squares[key], group=group)
        norm = torch.stack(list(squares.values())).sum().sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for _, param in grads:
            assert param.grad is not None
            _local(param.grad).mul_(scale)
        return float(norm)


def check_per_head(rule: Rule | AdamW, per_head: bool, where: str) -> None:
    """Refuse blocks for a rule that has no matrices.

    Raises:
        UsageError: names the place.
    """
    if per_head and isinstance(rule, AdamW):
        raise UsageError(
            f"{where}: per_head cuts matrices into heads, but rule=adamw steps entries: "
            "set per_head=false, or rule=steepest"
        )


def block_scale(rule: Rule, block: Block) -> float:
    """Size of a block over the size that its rule gives to a matrix of its shape.

    A head's block keeps the size it has in the whole matrix, so that a whole orthogonal matrix is
    also a point whose heads are each on the Stiefel manifold. 1 for what is not a head's block.

    Raises:
        UsageError: the manifold has no point of this shape.
    """
    if block.shape == block.whole:
        return 1.0
    try:
        whole, own = (_typical_singular_value(rule, s) for s in (block.whole, block.shape))
    except ValueError as error:
        raise UsageError(f"per_head: {error}") from None
    return whole / own


def _typical_singular_value(rule: Rule, shape: tuple[int, int]) -> float:
    """Root mean square, of a point of the manifold; in Euclidean space of a full direction.

    sqrt(d_out/d_in) and the radius for Stiefel and the spectral norm.
    """
    if rule.manifold.constrains:
        return rule.manifold.length(shape) / math.sqrt(min(shape))
    return rule.norm.extent(shape) / math.sqrt(min(shape))


def matrices_of(
    info: ParamInfo, name: str, rule: Rule, layout: Layout, group: str, per_head: bool = False
) -> list[Matrix]:
    """Matrices that a rule steps in one parameter: itself, its fused parts, or heads' blocks."""
    try:
        return [
            Matrix(
                param=info.name,
                box=Region(block.rows, block.cols),
                layout=layout,
                group=group,
                rule=name,
                reach=rule.reach,
                operands=2 if rule.needs_weight else 1,
                element_bytes=_WIRE.itemsize,
                flops=rule.flops(block.shape),
                orthogonalizes=rule.orthogonalizes,
                scale=block_scale(rule, block),
            )
            for block in info.blocks(per_head)
        ]
    except ValueError as error:
        raise UsageError(f"parameter '{info.name}': {error}") from None


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor
