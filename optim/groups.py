"""Param groups: parameters with their rule, held against what was declared of them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.entries import EntryRule
from geon.optim.matrices import block_scale, check_per_head
from geon.optim.norms import Spectral
from geon.optim.roles import Block, ParamInfo, Role
from geon.optim.rule import Rule
from geon.optim.shard import Layout, Ranks
from geon.optim.step import check_lr
from geon.optim.storage import lay, whole

FAR = 0.1
"""Largest residual of a weight that training may start from: directions are a quarter too long at
most there (tests/optim/test_lgm.py), and a few retractions bring it back to rounding."""
IDLE = ("skip", "coast")


@dataclass
class Group:
    """A route's parameters with their rule and learning rate.

    Attributes:
        name: of the group; in messages, plans and state dicts.
        rule: what steps it.
        lr: learning rate, which schedulers scale.
        params: each parameter with what its model declares of it.
        per_head: step each attention head's block as a matrix of its own; parameters without heads
            are stepped whole.
        idle: what happens to a parameter of a steepest rule that has no gradient in a step: skip
            leaves weight and momentum alone, as torch.optim does; coast takes the gradient as zero,
            so that the momentum decays and moves the weight on (experts that no token reached).
    """

    name: str
    rule: Rule | EntryRule
    lr: float
    params: Sequence[tuple[ParamInfo, Tensor]]
    per_head: bool = False
    idle: str = "skip"

    def __post_init__(self) -> None:
        where, self.params = f"group '{self.name}'", list(self.params)
        if not isinstance(self.rule, Rule | EntryRule):
            raise UsageError(
                f"{where}: the rule is a {type(self.rule).__name__}, expected a Rule, AdamW or "
                "another EntryRule"
            )
        check_lr(self.lr, where, self.rule)
        check_idle(self.rule, self.idle, where)
        check_per_head(self.rule, self.per_head, where)

    def describe(self) -> str:
        """Describe the rule of the group in one line, for tables."""
        return self.rule.describe() + (", per head" if self.per_head else "")

    def entry(self) -> dict[str, Any]:
        """The param group that an optimizer holds: plain values, which take effect when changed."""
        found = {
            "params": [(info.name, param) for info, param in self.params],
            "name": self.name,
            "rule": self.rule.name,
            "lr": self.lr,
        }
        if isinstance(self.rule, Rule):
            rule = self.rule
            return found | {
                "momentum": rule.momentum,
                "nesterov": rule.nesterov,
                "weight_decay": rule.decay,
                "idle": self.idle,
            }
        return found | self.rule.hyper

    def project_(self, within: float = 0.0) -> dict[str, float]:
        """Bring every weight to its manifold, in place; every rank must call on sharded ones.

        within: leave a weight as it is, to the last bit, whose residual is at most this.

        Returns: how far each that has a manifold was moved, over its length.

        Raises:
            UsageError: a weight without a nearest point; names the parameter.
        """
        if not isinstance(self.rule, Rule) or not self.rule.manifold.constrains:
            return {}
        return {
            info.name: project_(info, param, self.rule, self.per_head, within=within)
            for info, param in self.params
            if param.requires_grad and param.device.type != "meta"
        }


def cycled(
    rules: Mapping[str, Rule | EntryRule], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A torch optimizer's `defaults`: the rate, and what OneCycleLR may cycle.

    The rate is that of the first group: schedules that ask for it divide by it, and multiply all.
    """
    used = [rules[group["name"]] for group in groups]
    entries = [rule.hyper for rule in used if isinstance(rule, EntryRule)]
    return {
        "lr": groups[0]["lr"],
        **({"momentum": 0.95} if len(entries) < len(used) else entries[0]),
    }


def check_idle(rule: Rule | EntryRule, idle: str, where: str) -> None:
    """Refuse a word for idle parameters that is unknown, or without effect under a rule.

    Raises:
        UsageError: names the place.
    """
    if idle not in IDLE:
        raise UsageError(f"{where}: idle '{idle}' is not one of {', '.join(IDLE)}")
    if idle != "skip" and not isinstance(rule, Rule):
        raise UsageError(f"{where}: idle='{idle}' has no effect under {rule.name}")


def check_groups(
    groups: Sequence[Group], shapes: bool = True, known: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Hold parameters against what was declared of them, each exactly once.

    shapes: False where the tensors are pieces that a framework handed over.
    known: names of parameters that are stepped already, by group.

    Raises:
        UsageError: a name or a tensor that comes twice, another shape, a rule that does not fit.
    """
    if known is None and all(isinstance(group, Group) and not group.params for group in groups):
        raise UsageError("the optimizer got no parameters: its groups are empty")
    names = {name: group for group, members in (known or {}).items() for name in members}
    tensors: dict[Any, str] = {}
    for group in groups:
        if not isinstance(group, Group):
            raise UsageError(
                f"HybridOptimizer takes Groups, not {type(group).__name__}: names and shapes do "
                "not say what a parameter is to its model. Declare it: infos = classify(model), "
                "then [Group(name, rule, lr, [(info, parameter), ...]), ...]"
            )
        for info, param in group.params:
            if info.name in names:
                where = f"'{names[info.name]}' and '{group.name}'"
                raise UsageError(f"parameter '{info.name}' is in two param groups: {where}")
            names[info.name] = group.name
            for key in _identities(param):
                if key in tensors:
                    raise UsageError(
                        f"parameters '{tensors[key]}' and '{info.name}' are one tensor: declare a "
                        "tied weight once (role tied), under one name"
                    )
                tensors[key] = info.name
            if shapes and tuple(param.shape) != tuple(info.shape):
                raise UsageError(
                    f"parameter '{info.name}' is declared with shape {tuple(info.shape)} but has "
                    f"{tuple(param.shape)}: declare the model again after it is changed"
                )
            cut = not shapes or any(not p.is_replicate() for p in getattr(param, "placements", ()))
            if cut and isinstance(group.rule, EntryRule) and not group.rule.cuts:
                raise UsageError(
                    f"group '{group.name}': {group.rule.name} needs whole parameters, and "
                    f"'{info.name}' is cut over ranks: step it by AdamW, or use DDP"
                )
            _check_rows(group, info, param, shapes)
            if param.dtype == torch.float64 and isinstance(group.rule, Rule):
                raise UsageError(
                    f"parameter '{info.name}' is float64, and {group.rule.name} works in fp32, so "
                    "digits would be lost: cast the model to float32, or step it by AdamW"
                )
            _check_role(info, group)


def check_count(group: Mapping[str, Any]) -> None:
    """Refuse a param group whose parameters a framework has put into one tensor.

    Raises:
        UsageError: names the group.
    """
    names, params = group["param_names"], group["params"]
    if len(names) != len(params):
        raise UsageError(
            f"group '{group['name']}' was made of {len(names)} parameters and now holds "
            f"{len(params)} tensors: a framework has flattened them (DeepSpeed ZeRO 1 to 3 does), "
            "so there are no matrices to step; shard by fully_shard (FSDP2), or see "
            "docs/library.md"
        )


def _identities(param: Tensor) -> Iterable[Any]:
    """Yield keys of a parameter's tensor; two parameters that share a key are one tensor."""
    yield id(param)
    own = param.to_local() if hasattr(param, "to_local") else param
    if own.numel() and own.device.type != "meta":
        yield own.device, own.data_ptr()


def _check_rows(group: Group, info: ParamInfo, param: Tensor, shapes: bool) -> None:
    """Refuse what a rule of whole rows could not step: vectors, and pieces of rows."""
    if not (isinstance(group.rule, EntryRule) and group.rule.whole_rows):
        return
    cut = any(p.is_shard(param.ndim - 1) for p in getattr(param, "placements", ()))
    if len(info.shape) != 2 or cut or not shapes:
        what = f"of shape {info.shape}" if len(info.shape) != 2 else "cut within its rows"
        raise UsageError(
            f"group '{group.name}': {group.rule.name} steps whole rows of matrices, and "
            f"'{info.name}' is {what}: step it by AdamW"
        )


def _check_role(info: ParamInfo, group: Group) -> None:
    rule = group.rule
    if not isinstance(rule, Rule) or not isinstance(rule.norm, Spectral):
        return
    if info.role not in (Role.HIDDEN, Role.HEAD):
        raise UsageError(
            f"group '{group.name}': parameter '{info.name}' of role '{info.role}' and shape "
            f"{info.shape} under {rule.name}: a polar factor is for matrices between activations; "
            "take ColNorm or Sign for embeddings and tied weights, and AdamW or RMS for vectors"
        )


def check_near(info: ParamInfo, weight: Tensor, rule: Rule, per_head: bool) -> None:
    """Refuse a whole weight that is far from its manifold, or not finite, in any of its blocks.

    Raises:
        UsageError: names the parameter, how far it is, and what mends it.
    """
    off = residual(info, weight, rule, per_head)
    if not off <= FAR:
        raise UsageError(
            f"parameter '{info.name}' is not on {type(rule.manifold).__name__}: its residual "
            f"is {off:.2g}, at most {FAR:g} may be stepped. Bring it there by "
            "HybridOptimizer(..., project=True), by project_() of its Group or of the "
            "optimizer, or give it manifold=euclidean"
        )


@torch.no_grad()
def residual(info: ParamInfo, weight: Tensor, rule: Rule, per_head: bool) -> float:
    """Largest residual of the blocks of a whole weight; nan if one is not finite."""
    units = (unit.float() for _, unit in _units(info, weight, rule, per_head))
    found = [float(rule.manifold.distance(one)) for unit in units for one in unit]
    return max(found, key=lambda off: math.inf if math.isnan(off) else off, default=0.0)


@torch.no_grad()
def on_manifold(info: ParamInfo, weight: Tensor, rule: Rule | EntryRule, per_head: bool) -> Tensor:
    """Nearest point of the manifold of each block of a whole parameter, at the block's scale.

    Raises:
        UsageError: a block without a nearest point; names the parameter.
    """
    if not isinstance(rule, Rule) or not rule.manifold.constrains or not weight.numel():
        return weight
    found: dict[Block, list[Tensor]] = {}
    try:
        for block, unit in _units(info, weight, rule, per_head):
            near = torch.stack([rule.manifold.project(one) for one in unit])
            found.setdefault(block, []).append(near * block_scale(rule, block))
    except ValueError as error:
        raise UsageError(f"parameter '{info.name}': {error}") from None
    projected = torch.empty(info.matrix_shape, dtype=weight.dtype, device=weight.device)
    for block, matrices in found.items():
        projected[block.slices] = block.view.close(matrices, block.box)[0]
    return projected.view(info.shape)


def _units(
    info: ParamInfo, weight: Tensor, rule: Rule, per_head: bool
) -> Iterator[tuple[Block, Tensor]]:
    """Yield the matrices of each block of a whole weight, (count, d_out, d_in), at scale 1."""
    given = weight.reshape(info.matrix_shape)
    for block in info.blocks(per_head) if weight.numel() else ():
        for matrices in block.view.open(given[block.slices][None]):
            yield block, matrices / block_scale(rule, block)


@torch.no_grad()
def project_(
    info: ParamInfo,
    param: Tensor,
    rule: Rule | EntryRule,
    per_head: bool = False,
    layout: Layout | None = None,
    ranks: Ranks | None = None,
    within: float = 0.0,
) -> float:
    """Bring a weight to its rule's manifold, in place; every rank must call on a sharded one.

    layout, ranks: of a run that a framework handed over.

    Returns: how far it was moved, over its length.
    """
    if not isinstance(rule, Rule) or not rule.manifold.constrains:
        return 0.0
    ranks = ranks or Ranks()
    weight = whole(param, layout, ranks.group)
    if within and residual(info, weight, rule, per_head) <= within:
        return 0.0
    near = on_manifold(info, weight, rule, per_head)
    moved = float((near.float() - weight.float()).norm() / weight.float().norm().clamp_min(1e-30))
    lay(near, param, layout, ranks.rank)
    return moved
