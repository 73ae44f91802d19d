"""Optimizer state by name: saved by one optimizer, taken by another, whatever lies between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.storage import lay, whole

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_OWN_KEYS = ("params", "param_names", "names", "name", "rule")
"""What a param group keeps of its own when a saved one is loaded."""


def bare(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name


def saved_by_name(
    saved: Mapping[str, Any],
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """State and param group of each parameter in a state dict, by bare name.

    Raises:
        UsageError: a state dict without names.
    """
    states: dict[str, Mapping[str, Any]] = {}
    groups: dict[str, Mapping[str, Any]] = {}
    for group in saved["param_groups"]:
        keys = group["params"]
        # "names": written before 2026-11; strings: torch.distributed.checkpoint names parameters.
        names = group.get("param_names") or group.get("names")
        if names is None and all(isinstance(key, str) for key in keys):
            names = keys
        if names is None or len(names) != len(keys):
            raise UsageError(
                "the optimizer's state dict does not name its parameters (it was written by "
                "another optimizer?): state is matched by name and never by position"
            )
        for key, name in zip(keys, names, strict=True):
            groups[bare(name)] = group
            if key in saved["state"]:
                states[bare(name)] = saved["state"][key]
    return states, groups


def check_names(own: Mapping[str, bool], saved: Mapping[str, Any]) -> None:
    """Refuse a state dict of other parameters.

    own: by bare name, whether the parameter is trained.

    Raises:
        UsageError: names the first parameter that only one side has.
    """
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
    theirs = str(saved.get("rule", own)).split(",")[0]  # before 2026-11 its numbers followed
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
    if own.keys() != saved.keys():
        raise UsageError(
            f"parameter '{name}': the state dict has {', '.join(sorted(saved)) or 'nothing'}, "
            f"expected {', '.join(sorted(own))}: it was written by another rule"
        )
    for key, tensor in own.items():
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


def load_group(own: dict[str, Any], saved: Sequence[Mapping[str, Any]], first: str) -> None:
    """Take rates and other numbers of the saved group of the same name, or of its parameters."""
    named = [group for group in saved if group.get("name") == own["name"]]
    holding = [group for group in saved if first in _names(group)]
    for group in (named or holding)[:1]:
        for key, value in group.items():
            if key == "peak_lr":  # before 2026-11
                own["initial_lr"] = value
            elif key not in _OWN_KEYS:
                own[key] = value


def _names(group: Mapping[str, Any]) -> list[str]:
    names = group.get("param_names") or group.get("names") or group["params"]
    return [bare(str(name)) for name in names]


def relaid(state: Mapping[str, Any], old: Tensor, new: Tensor) -> dict[str, Any]:
    """State of a parameter that was replaced by another tensor of the same whole.

    What has the shape of the parameter is laid out like it; numbers a row and counters are whole on
    every rank, and stay so.
    """
    found: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.dim():
            found[key] = value
        elif value.shape == old.shape:
            found[key] = torch.zeros_like(new, dtype=value.dtype, requires_grad=False)
            take(value, found[key])
        else:
            found[key] = value.to(new.device)
    return found
