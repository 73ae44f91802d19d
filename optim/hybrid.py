"""One torch optimizer whose param groups each carry their rule."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from geon.errors import UsageError
from geon.optim.adamw import AdamW
from geon.optim.baselines import Baseline, Guests
from geon.optim.matrices import check_per_head, matrices_of
from geon.optim.polar import ieee_products
from geon.optim.readings import Readings
from geon.optim.roles import ParamInfo
from geon.optim.router import check_partition
from geon.optim.rule import Rule
from geon.optim.shard import (
    Arena,
    Exchange,
    Flat,
    Layout,
    Matrix,
    Plan,
    Wishes,
    holding,
    make_plan,
)
from geon.optim.storage import bytes_of, flat, grad_of, local, signature
from geon.optim.work import MatrixWork

# Averages are taken, and weights gathered, in fp32 whatever dtype they rest in: bf16 cannot hold a
# manifold better than 4e-3, and loses most of a small step to rounding.
_WORK = torch.float32


@dataclass
class Group:
    """A route's parameters with their rule and peak learning rate.

    per_head: step each attention head's block as a matrix of its own; parameters without heads are
    stepped whole.
    """

    name: str
    rule: Rule | AdamW | Baseline
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

    A third kind, Baseline, hands its group to another package's optimizer, for comparisons; it
    needs whole parameters (one process or DDP).

    Param groups are `{"params", "names", "name", "rule", "lr"}`; "rule" is the rule's description,
    so that `state_dict()` holds plain values only. State exists from construction on, like the
    parameters (a DTensor's state is a DTensor): {"momentum"} for steepest rules, torch's own keys
    for AdamW. A group whose lr is 0 is frozen: its weights, momenta and counters stay as they are.
    `readings` tells how good the directions of the last step were, where it was asked to look.

    Every rank must call `step()`: on sharded matrices it runs the collectives of `plan`. A
    parameter without a gradient counts as one with a zero gradient in a steepest group (its
    momentum still moves it), and is left alone in an AdamW group.

    shard: transports, buffers, and what to optimise for.
    mesh: the ranks that step together; needed for plain parameters that are equal on several ranks
        (DDP), whose work is then split. DTensors bring their own.
    wire: dtype of updates and directions that travel; weights always travel in fp32.
    max_norm: clip the gradients of AdamW groups to this global 2-norm within `step`; 0 never.
        Steepest directions do not depend on the length of the gradient.
    momentum: dtype that the momenta of steepest rules rest in between steps.
    separate: one param group and one bucket for each parameter, for frameworks that replace
        parameters and step group by group (DeepSpeed); see `adopt`.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        shard: Wishes | None = None,
        mesh: DeviceMesh | None = None,
        wire: torch.dtype = torch.float32,
        max_norm: float = 0.0,
        separate: bool = False,
        momentum: torch.dtype = torch.float32,
    ) -> None:
        self.rules = {g.name: g.rule for g in groups}
        self.max_norm = max_norm
        self.entry_norm: Tensor | None = None
        self._per_head = {g.name: g.per_head for g in groups}
        self._infos = {info.name: info for g in groups for info, _ in g.params}
        self._momentum = momentum
        self.guests = Guests()
        super().__init__(
            [
                {
                    "params": [p for _, p in members],
                    "names": [info.name for info, _ in members],
                    "name": g.name,
                    "rule": g.describe(),
                    "lr": g.lr,
                    "peak_lr": g.lr,
                }
                for g in groups
                for members in ([[pair] for pair in g.params] if separate else [g.params])
                if members
            ],
            {},
        )
        self._groups = list(self.param_groups)
        check_partition(self._infos, [group["names"] for group in self._groups])
        self._params: dict[str, Tensor] = {
            name: param
            for group in self._groups
            for name, param in zip(group["names"], group["params"], strict=True)
        }
        self.readings = Readings()
        self._wishes, self._wire, self._separate = shard or Wishes(), wire, separate
        arena = Arena.of(self._params.items(), mesh)
        self._settle(arena, {n: arena.layout(n, p) for n, p in self._params.items()})

    def adopt(self, params: Mapping[str, Tensor], arena: Arena, steps: Mapping[str, int]) -> None:
        """Step flat runs of the parameters instead, as DeepSpeed's ZeRO hands them over.

        params: this rank's run of each flattened parameter, by name; they are what `param_groups`
            hold from now on, though at times only some do: `step` steps those.
        steps: entries from one rank's run to the next's, by name.

        Starts all state anew.
        """
        self._params, self.state = dict(params), defaultdict(dict)
        shapes = {name: info.matrix_shape for name, info in self._infos.items()}
        self._settle(arena, {n: Flat(shapes[n], arena.size, steps[n]) for n in params})

    def _settle(self, arena: Arena, layouts: Mapping[str, Layout]) -> None:
        """Plan for the parameters as they lie, and make their state."""
        self._arena, self._layouts = arena, dict(layouts)
        self._signatures = {name: signature(p) for name, p in self._params.items()}
        device = next((p.device.type for p in self._params.values()), "cpu")
        matrices = self._matrices(self._wire.itemsize, device)
        self._exchange = Exchange(make_plan(matrices, self._wishes, self._separate), arena)
        self._make_state()

    @property
    def plan(self) -> Plan:
        """What a step sends and computes."""
        return self._exchange.plan

    @property
    def exchange(self) -> Exchange:
        """The exchange, with its counters."""
        return self._exchange

    @property
    def arena(self) -> Arena:
        """The ranks that step together."""
        return self._arena

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """How each parameter lies over them."""
        return self._layouts

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """All parameters, or the runs of them that were adopted, with their names."""
        return self._params.items()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter>.<key>": what a checkpoint holds of the optimizer."""
        return {
            f"{name}.{key}": tensor
            for name, param in self.named_parameters()
            for key, tensor in self.state[param].items()
            if isinstance(tensor, Tensor)
        }

    def state_bytes(self) -> int:
        """Bytes of state on this rank."""
        return sum(bytes_of(value) for value in self.state.values())

    def set_lr(self, fraction: float) -> None:
        """Set every group to this fraction of its peak learning rate."""
        for group in self._groups:
            group["lr"] = fraction * group["peak_lr"]

    def _steepest(self) -> Iterable[tuple[dict[str, Any], Rule]]:
        """Param groups of steepest rules."""
        for group in self._groups:
            if isinstance(rule := self.rules[group["name"]], Rule):
                yield group, rule

    def _matrices(self, wire_bytes: int, device: str) -> list[Matrix]:
        matrices: list[Matrix] = []
        for group, rule in self._steepest():
            per_head = self._per_head[group["name"]]
            for name in group["names"]:
                info, layout = self._infos[name], self._layouts[name]
                matrices += matrices_of(
                    info, group["name"], rule, layout, per_head, wire_bytes, device
                )
        return matrices

    def _make_state(self) -> None:
        for group in self._groups:
            rule = self.rules[group["name"]]
            if isinstance(rule, Baseline):
                self.guests.add(group, rule)
                continue
            for name in group["names"]:
                param = self._params[name]
                if isinstance(rule, AdamW):
                    self.state[param] = rule.new_state(param)
                    continue
                self.state[param] = {"momentum": torch.zeros_like(param, dtype=self._momentum)}
                if rule.second_moment:
                    shape = self._row_state_shape(name, self._per_head[group["name"]])
                    second = torch.zeros(shape, dtype=_WORK, device=param.device)
                    self.state[param]["second_moment"] = second

    def _row_state_shape(self, name: str, per_head: bool) -> tuple[int, ...]:
        """One number a row, whole on every rank; heads that own columns have a row of them each."""
        info = self._infos[name]
        columns = len({block.cols for block in info.blocks(per_head)})
        rows = info.matrix_shape[0]
        return (rows,) if columns == 1 else (columns, rows)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply one step to every group.

        The first matrices travel before AdamW groups are clipped and stepped.

        Raises:
            UsageError: a parameter lies otherwise than when the plan was made.
            ExchangeError: another rank is gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_places()
        active = [group for group in self.param_groups if group["params"]]
        work = self._work(active)
        names = {name for group in active for name in group["names"]}
        with ieee_products():
            self._exchange.run(work, names, lambda: self._step_entries(active))
        self.readings.close()
        return loss

    def _work(self, active: Sequence[dict[str, Any]]) -> MatrixWork:
        """Fold the gradients into the momenta; what the exchange then works on."""
        updates: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for group in active:
            rule, frozen = self.rules[group["name"]], float(group["lr"]) == 0.0
            if not isinstance(rule, Rule):
                continue
            for name in group["names"]:
                param = self._params[name]
                held = local(self.state[param]["momentum"])
                buffer = held.to(_WORK)
                if not frozen and param.grad is not None:
                    update = rule.average(grad_of(param).to(_WORK), buffer)
                else:
                    update = buffer if frozen else buffer.mul_(rule.momentum)
                if buffer is not held:
                    held.copy_(buffer)
                updates[name] = update.reshape(-1)
                weights[name] = flat(name, param)
        lrs = {group["name"]: float(group["lr"]) for group in active}
        rules = {group["name"]: rule for group, rule in self._steepest()}
        return MatrixWork(updates, weights, rules, lrs, self._row_state, self.readings)

    def _row_state(self, matrix: Matrix) -> Tensor:
        second: Tensor = self.state[self._params[matrix.param]]["second_moment"]
        if second.dim() == 2:
            second = second[matrix.box.cols[0] // matrix.shape[1]]
        return second[slice(*matrix.box.rows)]

    def _step_entries(self, active: Sequence[dict[str, Any]]) -> None:
        """Clip and step what is not stepped as matrices."""
        if self.max_norm:
            self.entry_norm = self.clip_entries_(self.max_norm)
        for group in active:
            rule = self.rules[group["name"]]
            if isinstance(rule, Baseline):
                self.state.update(self.guests.step(group))
                continue
            named = (self._params[name] for name in group["names"])
            params = [p for p in named if p.grad is not None]
            if isinstance(rule, AdamW) and params and float(group["lr"]) != 0.0:
                rule.step(
                    [local(p) for p in params],
                    [grad_of(p) for p in params],
                    [{k: local(v) for k, v in self.state[p].items()} for p in params],
                    float(group["lr"]),
                )

    @torch.no_grad()
    def clip_entries_(self, max_norm: float) -> Tensor | None:
        """Clip the gradients of element-wise groups to a global 2-norm; return the norm before.

        Steepest directions are scale invariant, so only the other groups are clipped. The norm is
        exact whatever meshes the parameters lie on: each square is divided by the number of ranks
        that hold a copy, and one sum goes over all ranks. None when no group is element-wise.
        """
        found: dict[str, Tensor] = {}
        for group in self._groups:
            if not isinstance(self.rules[group["name"]], Rule):
                for name in group["names"]:
                    if self._params[name].grad is not None:
                        found[name] = grad_of(self._params[name])
        if not found:
            return None
        squares = []
        for name, grad in found.items():
            copies = holding(self._layouts[name]).shares(self._arena.rank)
            squares.append(grad.float().square().sum() / copies)
        total = torch.stack(squares).sum()
        if self._arena.group is not None:
            dist.all_reduce(total, group=self._arena.group)
        norm = total.sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in found.values():
            grad.mul_(scale)
        return norm

    def _held(self) -> Iterable[tuple[str, Tensor]]:
        """What the param groups hold at the moment: under DeepSpeed not all of it."""
        for group in self.param_groups:
            yield from zip(group["names"], group["params"], strict=False)

    def _check_places(self) -> None:
        """Refuse to step parameters that have moved since the plan was made.

        Raises:
            UsageError: names the parameter, how it lay and how it lies.
        """
        for name, param in self._held():
            if (found := signature(param)) != (planned := self._signatures[name]):
                was, now = (", ".join(map(str, one)) for one in (planned, found))
                raise UsageError(
                    f"parameter '{name}' was planned as {was} and is now {now}: weights may "
                    "not be moved, resharded or replaced after the optimizer was made; make it "
                    "after fully_shard, parallelize_module and .to(device)"
                )
