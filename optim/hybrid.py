"""One torch optimizer whose param groups each carry their rule."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from geon.errors import UsageError
from geon.optim.entries import EntryRule
from geon.optim.groups import Group, check_count, check_groups, check_near, cycled, project_
from geon.optim.health import Watch, check_begun, check_policies, clip
from geon.optim.linalg import ieee_products
from geon.optim.matrices import plan_of
from geon.optim.readings import Readings
from geon.optim.roles import ParamInfo
from geon.optim.rule import Rule
from geon.optim.shard import Exchange, Layout, Placement, Plan, Ranks, Sharding, holding
from geon.optim.state import Here, Member, carried, load_group, loaded, new_state
from geon.optim.step import Active, Step, Verdict, glance, judge, rule_now, signature
from geon.optim.storage import bytes_of, check_contiguous, settled, whole

_KEPT = (
    *("rules", "max_norm", "nonfinite", "skipped", "entry_norm", "readings", "watch"),
    *("_infos", "_per_head", "_momentum", "_sharding", "_joining", "_begun"),
)
"""Attributes that copies of an optimizer take along besides torch's own."""


class HybridOptimizer(torch.optim.Optimizer):
    """Steps each param group by its rule: steepest rules on whole matrices, AdamW on entries.

    A torch optimizer in every other respect. A parameter that does not require a gradient, or has
    none, is left alone: not moved, not decayed, no state spent (`Group.idle` says otherwise). Param
    groups hold plain values, which take effect when changed: "lr", "weight_decay", and "momentum"
    and "nesterov" of steepest rules, "betas" and "eps" of AdamW. A scheduler that sets "momentum"
    everywhere (OneCycleLR) sets AdamW's first beta by it. At lr 0 weights stay as they are to the
    last bit, and momenta are averaged on; a step of zero gradients at lr 0, by which
    torch.distributed.checkpoint makes state, changes nothing.

    State is {"momentum"} and row states for steepest rules ("draws" too if momenta rest in bf16, to
    count their roundings), torch's own keys for AdamW, made for
    trained parameters at once, or on several ranks that do not say how these lie, when they do; a
    DTensor's state is a DTensor. `state_dict` names parameters, and `load_state_dict` matches them
    by name, with or without "module." and "_orig_mod.", keeps the dtypes that this optimizer was
    made with, and refuses the state of another rule.

    Every rank must call `step()`, with gradients of the same parameters: on sharded matrices it
    runs the collectives of `plan`. Parameters that are replaced, moved or (un)frozen between steps
    are found and planned again.

    sharding: transports, buffers, words on the wire, and what to optimise for.
    mesh: the ranks that step together; needed for plain parameters that are equal on several ranks
        (DDP), whose work is then split. DTensors bring their own.
    max_norm: clip the gradients of element-wise groups to this global 2-norm within `step`; 0
        never. Steepest directions do not depend on the length of the gradient.
    momentum: dtype that the momenta of steepest rules rest in between steps: fp32, or bf16, rounded
        by chance (`optim/rounding.py`).
    nonfinite: what a gradient with nan or infinity does. raise: FloatingPointError on every rank,
        with nothing changed. skip: leave out the step, counted in `skipped`. ignore: do not look.
    watch: what else is looked at: the loss, weights and state after a step, spikes.
    project: bring weights to their manifolds now; otherwise weights further than 0.1 are refused.
    placement: how the parameters lie, for frameworks that hand over pieces (DeepSpeed).

    Raises:
        UsageError: groups that are not what they declare, or that no plan can be made for.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        sharding: Sharding | None = None,
        mesh: DeviceMesh | None = None,
        *,
        max_norm: float = 0.0,
        momentum: torch.dtype = torch.float32,
        nonfinite: str = "raise",
        watch: Watch | None = None,
        project: bool = False,
        placement: Placement | None = None,
    ) -> None:
        groups = list(groups) if isinstance(groups, Iterable) else [groups]
        check_groups(groups, shapes=placement is None)
        self.watch = watch or Watch()
        check_policies(nonfinite, max_norm, mesh, placement, self.watch)
        self.rules: dict[str, Rule | EntryRule] = {}
        self.max_norm, self.nonfinite, self.skipped = max_norm, nonfinite, 0
        self.entry_norm: Tensor | None = None
        self.readings = Readings()
        self._infos: dict[str, ParamInfo] = {}
        self._per_head: dict[str, bool] = {}
        self._momentum = momentum
        self._sharding, self._mesh, self._placement = sharding or Sharding(), mesh, placement
        self._adjusted: dict[str, Rule] = {}
        self._exchange: Exchange | None = None
        self._layouts, self._copies = dict[str, Layout](), dict[str, int]()
        self._seen: dict[str, tuple[ReferenceType[Tensor], tuple[Any, ...]]] = {}
        self._joining, self._begun = True, False
        super().__init__([self._register(group) for group in groups if group.params], {})
        self._joining = False
        self.defaults = cycled(self.rules, self.param_groups)
        self._plan()
        if project:
            self.project_()
        self.check_on_manifold()

    def _register(self, group: Group) -> dict[str, Any]:
        """Note the rule and the parameters of a group; return it as torch is to hold it."""
        if group.name in self.rules:
            raise UsageError(f"two param groups are named '{group.name}'")
        if isinstance(group.rule, EntryRule):
            group.rule.begin(group.name, [param for _, param in group.params], group.lr)
        self.rules[group.name] = group.rule
        self._per_head[group.name] = group.per_head
        self._infos |= {info.name: info for info, _ in group.params}
        return group.entry()

    def add_param_group(self, param_group: Any) -> None:
        """Add one more Group to the optimizer.

        Raises:
            UsageError: a plain dict, which says neither roles nor a rule; or as for the others.
        """
        if self._joining:
            super().add_param_group(param_group)
            return
        own = {group["name"]: group["param_names"] for group in self.param_groups}
        check_groups([param_group], self._placement is None, own)
        if not param_group.params:
            return
        known = dict(self.rules), dict(self._infos), dict(self._per_head)
        count, self.defaults = len(self.param_groups), {}
        try:
            super().add_param_group(self._register(param_group))
            self._plan()
            self.check_on_manifold([info.name for info, _ in param_group.params])
        except Exception:
            del self.param_groups[count:]
            self.rules, self._infos, self._per_head = known
            for _, param in param_group.params:
                self.state.pop(param, None)
            self._exchange = None
            raise
        finally:
            self.defaults = cycled(self.rules, self.param_groups)

    # What there is, by name.

    def _named(self) -> Iterable[tuple[dict[str, Any], str, Tensor]]:
        for group in self.param_groups:
            if len(group["param_names"]) != len(group["params"]):
                check_count(group)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                yield group, name, param

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """All parameters, or what a framework holds in their place, with their names."""
        return [(name, param) for _, name, param in self._named()]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter>.<key>": what a checkpoint holds of the optimizer."""
        return {
            f"{name}.{key}": tensor
            for name, param in self.named_parameters()
            for key, tensor in self.state.get(param, {}).items()
            if isinstance(tensor, Tensor)
        }

    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        return sum(bytes_of(value) for value in self.state.values())

    def set_lr(self, fraction: float) -> None:
        """Set every group to this fraction of its "initial_lr": its rate before the first call."""
        for group in self.param_groups:
            group["lr"] = fraction * group.setdefault("initial_lr", group["lr"])

    @property
    def exchange(self) -> Exchange:
        """The exchange that runs the plan, with its counters."""
        if self._exchange is None:
            self._plan()
        assert self._exchange is not None
        return self._exchange

    @property
    def plan(self) -> Plan:
        """Plan of a step: what is sent and computed on every rank."""
        return self.exchange.plan

    @property
    def ranks(self) -> Ranks:
        """The ranks that step together."""
        return self.exchange.ranks

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """Layout of each parameter over the ranks that step together, by name."""
        assert self.exchange  # planned by now
        return self._layouts

    def _plan(self) -> None:
        """Plan for the parameters as they lie, and make the state of those that are trained."""
        named = dict(self.named_parameters())
        for item in named.items():
            check_contiguous(*item)
        if self._placement is None:
            ranks = Ranks.of(named.items(), self._mesh)
            self._layouts = {name: ranks.layout(name, param) for name, param in named.items()}
        else:
            ranks, self._layouts = self._placement.ranks, dict(self._placement.layouts)
        self._copies = {n: holding(one).shares(ranks.rank) for n, one in self._layouts.items()}
        members = []
        for group, name, param in self._named():
            rule = self.rules[group["name"]]
            if isinstance(rule, Rule) and param.requires_grad:
                per_head = self._per_head[group["name"]]
                members.append((self._infos[name], group["name"], rule, per_head))
        device = next((p.device.type for p in named.values()), "cpu")
        plan = plan_of(members, self._layouts, self._sharding, device)
        self._exchange = Exchange(plan, ranks, self._exchange)
        self._seen = {name: (ref(param), signature(param)) for name, param in named.items()}
        self._make_state()

    def _make_state(self) -> None:
        """Make the state that trained parameters lack, once it is known how they lie."""
        known = self._begun or self._mesh is not None or self._placement is not None
        for group, name, param in self._named() if known or settled(self._seen.values()) else ():
            if param.requires_grad and not self.state.get(param):
                self.state[param] = self._new_state(group, name, param)

    def _new_state(self, group: Mapping[str, Any], name: str, param: Tensor) -> dict[str, Any]:
        rule, per_head = self.rules[group["name"]], self._per_head[group["name"]]
        return new_state(rule, self._infos[name], per_head, param, self._momentum)

    def _refresh(self) -> None:
        """Find parameters that are not what was planned for, and plan again.

        Raises:
            UsageError: a parameter of another shape.
        """
        names = {name for _, name, _ in self._named()}
        changed, arrived = self._exchange is None or self._seen.keys() != names, []
        for group, name, param in self._named():
            was, planned = self._seen.get(name, (ref(param), ()))
            if param is not (old := was()) or signature(param) != planned:
                changed = True
                shape = tuple(self._infos[name].shape)
                if self._placement is None and tuple(param.shape) != shape:
                    raise UsageError(
                        f"parameter '{name}' has shape {tuple(param.shape)}, and the optimizer was "
                        f"made for {shape}: make it again after the model is changed"
                    )
                arrived += [name] if planned else []
                if old is not None and (state := self.state.pop(old, None)):
                    self.state[param] = carried(state, self._new_state(group, name, param))
        self._make_state()
        if changed:
            self._plan()
            self.check_on_manifold(arrived)

    def project_(self) -> None:
        """Bring every weight to its manifold, in place; every rank must call.

        Raises:
            UsageError: a weight without a nearest point; names the parameter.
        """
        for group, name, param in self._named():
            rule, per_head = self.rules[group["name"]], self._per_head[group["name"]]
            if param.requires_grad:
                layout = self.layouts[name] if self._placement else None
                project_(self._infos[name], param, rule, per_head, layout, self.ranks)

    def check_on_manifold(self, names: Collection[str] | None = None) -> None:
        """Refuse weights that are far from their manifold; every rank must call.

        names: of the parameters to look at; all of them if None.

        Steps from there are not small: they grow or shrink the weight by what it is off.

        Raises:
            UsageError: names the parameter, how far it is, and what mends it.
        """
        for group, name, param in self._named():
            rule, info = self.rules[group["name"]], self._infos[name]
            trained = param.requires_grad and param.device.type != "meta"
            trained &= names is None or name in names
            if not (trained and isinstance(rule, Rule) and rule.manifold.constrains):
                continue
            weight = whole(param, self.layouts[name], self.ranks.group)
            check_near(info, weight, rule, self._per_head[group["name"]])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step from the gradients that are there.

        Returns: what the closure returned, if there is one.

        Raises:
            UsageError: a parameter of another shape, a rate or number out of range.
            FloatingPointError: a gradient that is not finite, as `nonfinite` says.
            ExchangeError: another rank is gone.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh()
        everyone = [
            Active(group, rule_now(group, self.rules[group["name"]], self._adjusted))
            for group in self.param_groups
        ]
        for one in everyone:
            one.collect()
        active = [one for one in everyone if one.names or one.coasting]
        self._begun = self._begun or check_begun(bool(active))
        self._make_state()
        if (go := self._judge(active)) is not Verdict.GO:
            self.skipped += go is Verdict.SKIP
            return loss
        alone = self._sharding.reproducible
        step = Step(self.ranks.rank, alone, self.readings, self.layouts)
        for one in everyone:
            if isinstance(one.rule, Rule):
                step.fold(one, self.state)
        cuda = any(weight.is_cuda for weight in step.weights.values())
        with ieee_products() if cuda else nullcontext():
            self.exchange.run(step, step.moving, lambda: self._step_entries(active))
        if self.readings.wanted:
            self.readings.close()
        if self.watch.updates:
            glance(self.watch, active, self.state)
        return loss

    def settle(self) -> None:
        """Ask whether the last step left weights and state finite; waits. Every rank must call.

        Raises:
            FloatingPointError: names the first tensor that is not.
        """
        self._judge([])

    def _judge(self, active: Sequence[Active]) -> Verdict:
        clips = bool(self.max_norm)
        return judge(active, self.watch, self.nonfinite, clips, self.ranks, self._copies)

    def _step_entries(self, active: Sequence[Active]) -> None:
        """Clip and step the parameters that are not stepped as matrices."""
        entries = [(one, one.rule) for one in active if isinstance(one.rule, EntryRule)]
        if self.max_norm and entries:
            pairs = [pair for one, _ in entries for pair in zip(one.names, one.grads, strict=True)]
            self.entry_norm = clip(pairs, self.max_norm, self._copies, self.ranks)
        for one, rule in entries:
            rule.step(one.group, one.params, one.grads, [self.state[p] for p in one.params])

    def state_dict(self) -> dict[str, Any]:
        """State dict as torch.optim makes it, with "param_names" in its param groups."""
        self._refresh()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and numbers of parameters of the same names, into tensors of one's own.

        Nothing is changed unless all of it fits. Every rank must call.

        Raises:
            UsageError: other parameters, another rule's state, a state dict without names.
        """
        self._refresh()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        members = [
            Member(name, param, self.rules[group["name"]].name, self._new_state(group, name, param))
            for group, name, param in self._named()
        ]
        found = loaded(state_dict, members)
        self.state.clear()
        self.state |= {p: s for p, s in found.items() if s and state_dict["state"]}
        self._make_state()
        for group in self.param_groups:
            load_group(group, state_dict["param_groups"])
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        """Attributes that copies take along: all but what belongs to this process."""
        kept = {name: self.__dict__[name] for name in _KEPT} | super().__getstate__()
        return {**kept, "_mesh": Here(self._mesh), "_placement": Here(self._placement)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled optimizer; it is planned again when needed."""
        super().__setstate__(state)
        self._mesh, self._placement = state["_mesh"].value, state["_placement"].value
        self._exchange, self._seen, self._adjusted, self._layouts = None, {}, {}, {}
