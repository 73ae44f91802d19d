"""Optimizer state by name: saved by one optimizer, taken by another, whatever lies between them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.entries import EntryRule
from geon.optim.roles import ParamInfo
from geon.optim.rounding import DRAWS, first_draw
from geon.optim.rule import Rule
from geon.optim.step import WORK
from geon.optim.storage import lay, whole

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OWN_KEYS = ("params", "param_names", "names", "name", "rule")
"""Keys that a param group keeps of its own when a saved one is loaded."""


def bare(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name


def new_state(
    rule: Rule | EntryRule, info: ParamInfo, per_head: bool, param: Tensor, momentum: torch.dtype
) -> dict[str, Any]:
    """State of a parameter before its first step; a DTensor's momentum is a DTensor.

    Row states are whole on every rank, (rows,) of all matrices, or (heads, d_out) where heads own
    columns.

    momentum: dtype that the momenta of steepest rules rest in.

    Raises:
        UsageError: momenta that are neither fp32 nor bf16.
    """
    if not isinstance(rule, Rule):
        return rule.new_state(param)
    if momentum not in (WORK, torch.bfloat16):
        raise UsageError(f"momentum={momentum}: momenta rest in torch.float32 or torch.bfloat16")
    like = torch.zeros_like(param, dtype=momentum, requires_grad=False)
    state: dict[str, Any] = {"momentum": like}
    if momentum != WORK:
        state[DRAWS] = first_draw(info.name, param.device)
    blocks = info.blocks(per_head) if rule.row_states else ()
    rows = blocks[-1].states[1] if blocks else 0
    across = per_head and info.head_axis == 1 and info.heads and not info.splits
    for key in rule.row_states:
        shape = (len(blocks), rows // len(blocks)) if across else (rows,)
        state[key] = torch.zeros(shape, dtype=WORK, device=param.device)
    return state


class Member(NamedTuple):
    """A parameter that takes saved state.

    Attributes:
        rule: name of its rule.
        fresh: its state as it starts: tensors that saved ones are copied into. Empty for rules that
            make their state as they step.
    """

    name: str
    param: Tensor
    rule: str
    fresh: dict[str, Any]


def loaded(saved: Mapping[str, Any], members: Sequence[Member]) -> dict[Tensor, dict[str, Any]]:
    """State of each parameter, empty for one that has none; every rank must call.

    Raises:
        UsageError: no names, other parameters, or another rule's state.
    """
    states, groups = _by_name(saved)
    _check_names({bare(one.name): one.param.requires_grad for one in members}, groups)
    found: dict[Tensor, dict[str, Any]] = {}
    for name, param, rule, fresh in members:
        if (state := states.get(bare(name))) is None:  # it was not trained there: it starts anew
            found[param] = fresh if param.requires_grad else {}
            continue
        check_rule(name, rule, groups[bare(name)])
        if fresh:
            fill(name, fresh, state)
        found[param] = fresh or copy.deepcopy(dict(state))
    return found


def _by_name(
    saved: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """State and param group of each parameter in a state dict, by bare name."""
    states: dict[str, Mapping[str, Any]] = {}
    groups: dict[str, Mapping[str, Any]] = {}
    for group in saved["param_groups"]:
        for key, name in zip(group["params"], _names(group), strict=True):
            groups[name] = group
            if key in saved["state"]:
                states[name] = saved["state"][key]
    return states, groups


def _names(group: Mapping[str, Any]) -> list[str]:
    """Bare names of the parameters of a saved group."""
    keys = group["params"]
    # "names": written before 2026-11; strings: torch.distributed.checkpoint names parameters.
    names = group.get("param_names") or group.get("names")
    if names is None and all(isinstance(key, str) for key in keys):
        names = keys
    if names is None or len(names) != len(keys):
        raise UsageError(
            "the optimizer's state dict does not name its parameters (it was written by another "
            "optimizer?): state is matched by name and never by position"
        )
    return [bare(name) for name in names]


def _check_names(own: Mapping[str, bool], saved: Mapping[str, Any]) -> None:
    """Refuse a state dict of other parameters. own: whether each parameter is trained."""
    if foreign := sorted(set(saved) - set(own)):
        raise UsageError(
            f"the state dict is of parameter '{foreign[0]}' and {len(foreign) - 1} more that this "
            f"optimizer does not have (it has '{next(iter(own))}' and others)"
        )
    if missing := sorted(name for name, trained in own.items() if trained and name not in saved):
        raise UsageError(
            f"the state dict has no parameter '{missing[0]}', and {len(missing) - 1} more that "
            "this optimizer trains"
        )


def check_rule(name: str, own: str, saved: Mapping[str, Any]) -> None:
    """Refuse the state of another rule; its numbers may differ.

    Raises:
        UsageError: names the parameter and both rules.
    """
    theirs = str(saved.get("rule", own))
    if ", " in theirs:  # before 2026-11: norm x manifold and numbers, nothing of the state
        theirs, own = theirs.split(", ")[0], own.split(" + ")[0]
    if theirs != own:
        raise UsageError(
            f"parameter '{name}': the state dict is of rule '{theirs}', this optimizer steps it "
            f"by '{own}': start its state anew, or make the optimizer with the saved rule"
        )


def fill(name: str, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Copy saved state into own tensors, which keep their dtype, device and layout.

    Raises:
        UsageError: other keys, or other shapes.
    """
    # Momenta that rested in fp32 were never rounded, or were before 2026-12 without a count.
    free = {DRAWS} if "momentum" in own else set()
    if own.keys() - free != saved.keys() - free:
        raise UsageError(
            f"parameter '{name}': the state dict has {', '.join(sorted(saved)) or 'nothing'}, "
            f"expected {', '.join(sorted(own))}: it was written by another rule"
        )
    for key, tensor in own.items():
        if key not in saved:
            continue
        given = torch.as_tensor(saved[key])
        if given.shape != tensor.shape:
            raise UsageError(
                f"parameter '{name}': saved {key} has shape {tuple(given.shape)}, expected "
                f"{tuple(tensor.shape)}"
            )
        take(given, tensor)


def take(given: Tensor, own: Tensor) -> None:
    """Copy a tensor into one of the same whole, however either lies; every rank must call."""
    same = getattr(given, "placements", None) == getattr(own, "placements", None)
    if same and getattr(given, "device_mesh", None) == getattr(own, "device_mesh", None):
        own.copy_(given)
    else:
        lay(whole(given).to(own.device), own)


def load_group(own: dict[str, Any], saved: Sequence[Mapping[str, Any]]) -> None:
    """Take rates and other numbers of the saved group of the same name, or of its parameters."""
    first = bare(own["param_names"][0])
    named = [group for group in saved if group.get("name") == own["name"]]
    holding = [group for group in saved if first in _names(group)]
    for group in (named or holding)[:1]:
        for key, value in group.items():
            if key == "peak_lr":  # before 2026-11
                own["initial_lr"] = value
            elif key not in _OWN_KEYS:
                own[key] = value


def carried(state: Mapping[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """State of a parameter that was replaced, moved or cast; every rank must call.

    fresh: state of what it is now, as it starts; empty for rules that make theirs as they step.
    """
    for key, own in fresh.items():
        take(state[key], own)
    return fresh or dict(state)


class Here:
    """A value that copies share, and that does not leave the process."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> "Here":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Here, ()
