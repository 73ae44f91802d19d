"""An optimizer for any model in one call."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from geon.configs.choices import MomentumDtype
from geon.configs.recipes import OptimConfig, OverrideConfig, fill, read
from geon.errors import UsageError
from geon.optim.foreign import Override, classified, explain
from geon.optim.groups import FAR
from geon.optim.hybrid import HybridOptimizer
from geon.optim.modular.foreign import describe
from geon.optim.roles import ParamInfo, Role
from geon.optim.routing import ROLES, Routing, route_by
from geon.optim.shard import Sharding
from geon.optim.tree import bare


@overload
def build() -> Callable[..., HybridOptimizer]: ...


@overload
def build(
    model: nn.Module,
    recipe: str = "hybrid",
    lr: float | None = None,
    *,
    overrides: Mapping[str, Override | Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    fallback: bool = False,
    project: bool | None = None,
    verbose: bool = True,
    sharding: Sharding | None = None,
    mesh: DeviceMesh | None = None,
) -> HybridOptimizer: ...


def build(
    model: nn.Module | None = None,
    recipe: str = "hybrid",
    lr: float | None = None,
    *,
    overrides: Mapping[str, Override | Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    fallback: bool = False,
    project: bool | None = None,
    verbose: bool = True,
    sharding: Sharding | None = None,
    mesh: DeviceMesh | None = None,
) -> HybridOptimizer | Callable[..., HybridOptimizer]:
    """Make the optimizer of a recipe for a model, and print who steps what.

    In place of `torch.optim.AdamW(model.parameters(), lr=...)`, after the model is on its device
    and sharded. Costs one pass over the names, and, if a recipe keeps weights on a manifold, one
    exact projection of each.

    model: without one, this function is returned: transformers.Trainer calls a factory twice, so
        `optimizer_cls_and_kwargs=(build, {"recipe": "muon", "lr": 0.02})` serves there.
    recipe: a file of configs/optim: hybrid, muon, manifold_muon, normuon, scion, adamw and others.
    lr: of the recipe's hidden matrices, and of what follows them; the recipe's own if None.
    overrides: glob over names -> what the parameters are (a role, `stored(...)`, `fused(...)`), or
        a mapping with changes to their rule, e.g. {"lr": 0.01, "manifold": "stiefel"}.
    settings: values by dotted key of the recipe, e.g. {"hidden.weight_decay": 0.0}. Gradients of
        element-wise groups are clipped only if this sets "max_norm".
    fallback: leave what nothing sure can be said of to the recipe's rule for the rest, AdamW in
        most, instead of refusing it; it is listed below the table.
    project: bring weights to the manifolds of their rules now, in place. None does so for those
        that are far from theirs, and leaves those that were trained there as they are; it refuses a
        model that says it was loaded from a checkpoint and is far.
    verbose: print on rank 0.
    sharding, mesh: as for `HybridOptimizer`.

    Raises:
        UsageError: an unknown recipe or setting; parameters that nothing sure can be said of, all
            in one message; a loaded weight that is not on its manifold.
    """
    if model is None:
        return build
    config = read(recipe, lr, {"max_norm": 0.0, **(settings or {})})
    said = overrides or {}
    roles = {glob: one for glob, one in said.items() if not isinstance(one, Mapping)}
    rules = {glob: one for glob, one in said.items() if isinstance(one, Mapping)}
    infos, unsure = classified(model, roles)
    if unsure and not fallback:
        raise UsageError(explain(unsure, [info.name for info in infos]))
    _add_rules(config, rules, infos)
    routing = route_by(infos, config, network=lambda: describe(model, infos))
    for name, rule in routing.configs.items():
        if rule.cooldown:
            raise UsageError(
                f"{name}.cooldown={rule.cooldown}: only runs of train.py have a schedule; here "
                "your own scheduler sets the rates, so leave it out"
            )
    groups = routing.groups(dict(model.named_parameters()))
    loaded = _loaded_from(model)
    if project or (project is None and not loaded):
        near = 0.0 if project else FAR
        moved = {name: by for group in groups for name, by in group.project_(near).items()}
    else:
        moved = {}
    try:
        optimizer = HybridOptimizer(
            groups,
            sharding,
            mesh,
            max_norm=config.max_norm,
            momentum=_MOMENTA[config.momentum_dtype],
            nonfinite=config.nonfinite.value,
        )
    except UsageError as error:
        if loaded and project is None and "is not on" in str(error):
            raise UsageError(
                f"the model was loaded from '{loaded}', and recipe '{recipe}' would change its "
                f"weights before the first step: {error}. To fine-tune, take a recipe without a "
                "manifold (muon, normuon, adamw); or build(..., project=True), which changes them: "
                "the hybrid least with settings={'overrides.qk': None}"
            ) from None
        raise
    if verbose and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
        print("\n".join(_report(recipe, routing, moved, list(unsure), frozen)))
    return optimizer


_MOMENTA = {MomentumDtype.fp32: torch.float32, MomentumDtype.bf16: torch.bfloat16}


def _add_rules(
    config: OptimConfig, rules: Mapping[str, Mapping[str, Any]], infos: list[ParamInfo]
) -> None:
    """Add routes of their own for globs whose rule is changed."""
    own: dict[str, Any] = {}
    for glob, changes in rules.items():
        if "pattern" in changes:
            raise UsageError(f"overrides['{glob}']: its pattern is the glob itself")
        members = [i for i in infos if fnmatchcase(i.name, glob) or fnmatchcase(bare(i.name), glob)]
        bases = {name for name, roles in ROLES.items() for i in members if i.role in roles}
        if len(bases) != 1:
            raise UsageError(
                f"overrides: '{glob}' matches {len(members)} parameters"
                + (f" of the rules {', '.join(sorted(bases))}: give each a glob" if bases else "")
            )
        base = asdict(getattr(config, bases.pop()))
        pattern = "|".join(info.name for info in members)
        content = {**base, **changes, "pattern": pattern}
        own[glob] = fill(OverrideConfig, content, prefix=f"overrides['{glob}'].")
    config.overrides = own | config.overrides


def _loaded_from(model: nn.Module) -> str:
    """Name of the checkpoint that a transformers model says it was loaded from; '' for none."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "_name_or_path", "") for config in configs)
    return next((name for name in names if isinstance(name, str) and name), "")


def told_moved(moved: Mapping[str, float]) -> str:
    """A line on weights that were brought to their manifolds; '' where none went far.

    moved: how far each was moved, over its length.
    """
    far = {name: by for name, by in moved.items() if by > 1e-3}
    if not far:
        return ""
    name = max(far, key=lambda one: far[one])
    return (
        f"brought to their manifolds: {len(far)} of {len(moved)} weights, by {far[name]:.0%} "
        f"of their length at most ('{name}')"
    )


def _report(
    recipe: str,
    routing: Routing,
    moved: Mapping[str, float],
    unsure: Sequence[str],
    frozen: Collection[str],
) -> Iterator[str]:
    yield f"optimizer: {recipe}"
    trained = [info for info in routing.infos if info.name not in frozen]
    yield replace(routing, infos=trained).table()
    if frozen:
        yield f"frozen, so left alone: {len(frozen)} parameters"
    if told := told_moved(moved):
        yield told
    if unsure:
        yield f"unsure, so stepped as the rest: {', '.join(unsure)}"
    roles = {info.role: info.name for info in reversed(routing.infos)}
    if Role.EMBEDDING in roles and not {Role.HEAD, Role.TIED} & roles.keys():
        yield (
            f"no head was found: if one is called by hand (x @ embedding.weight.T), say "
            f"overrides={{'{roles[Role.EMBEDDING]}': 'tied'}}"
        )
