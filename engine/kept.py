"""State that other packages' optimizers keep, as named tensors and plain numbers, and back.

They make their state as they step, of whatever they like: tensors, numbers, lists of tensors,
objects. What is saved is each tensor by its path, and a description of the rest in JSON: a number
stands for itself, everything else is a dict of one kind: tensor, list, tuple, dict or object.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from geon.errors import UsageError
from geon.optim import Baseline, HybridOptimizer

Make = Callable[[str, str], Tensor]
"""An empty tensor of the saved shape for (name, "cpu" or "own" device)."""


def tensors(optimizer: HybridOptimizer) -> dict[str, Tensor]:
    """Every tensor that baselines keep, by "<parameter>.<path>"."""
    found: dict[str, Tensor] = {}
    for name, param, _ in _members(optimizer):
        _split(dict(optimizer.state.get(param, {})), name, param, found)
    return found


def numbers(optimizer: HybridOptimizer) -> dict[str, Any]:
    """All else that baselines keep, by parameter and by group, for JSON; empty without baselines.

    Raises:
        UsageError: names what cannot be held.
    """
    states: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name, param, _ in _members(optimizer):
        states[name] = _split(dict(optimizer.state.get(param, {})), name, param, {})
    for group in optimizer.param_groups:
        rule = optimizer.rules[group["name"]]
        if isinstance(rule, Baseline):
            own = {k: v for k, v in rule.counted(group).items() if v is not None}
            groups[group["name"]] = _split(own, group["name"], None, {})
    rules = {name: rule.key for name, _, rule in _members(optimizer)}
    return {"rules": rules, "states": states, "groups": groups} if groups else {}


def restore(optimizer: HybridOptimizer, saved: Mapping[str, Any], make: Make) -> None:
    """Give baselines the state that was saved, its tensors still empty.

    Raises:
        UsageError: names the parameter whose state is missing or of another optimizer.
    """
    for name, _, rule in _members(optimizer):
        if (key := saved.get("rules", {}).get(name)) != rule.key:
            raise UsageError(
                f"the checkpoint holds no state of '{name}' for baseline '{rule.key}' but for "
                f"{repr(key) if key else 'nothing'}: it was written by another optimizer, or "
                "before such state was held; set checkpoint.resume=never"
            )
    try:
        for name, param, rule in _members(optimizer):
            described = saved["states"][name]
            own = rule.example(param) if "object" in str(described) else {}
            optimizer.state[param] = dict(_join(described, name, make, own))
        for group in optimizer.param_groups:
            if isinstance(optimizer.rules[group["name"]], Baseline):
                counted = _join(saved["groups"][group["name"]], group["name"], make, {})
                group["numbers"] = {**group.get("numbers", {}), **counted}
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"the state of the optimizer in the checkpoint is garbled ({error!r:.100})"
        ) from None


def _members(optimizer: HybridOptimizer) -> Iterator[tuple[str, Tensor, Baseline]]:
    for group in optimizer.param_groups:
        rule = optimizer.rules[group["name"]]
        if isinstance(rule, Baseline):
            for name, param in zip(group["param_names"], group["params"], strict=True):
                yield name, param, rule


def _split(value: Any, path: str, param: Tensor | None, found: dict[str, Tensor]) -> Any:
    """Description of a value; its tensors are added to `found` by path."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        found[path] = value.detach()
        own = param is not None and value.device == param.device
        return {"tensor": "own" if own else "cpu"}
    if isinstance(value, (list, tuple)):
        items = [_split(item, f"{path}.{i}", param, found) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _split(v, f"{path}.{k}", param, found) for k, v in value.items()}}
    if hasattr(value, "__dict__"):
        kept = {k: v for k, v in vars(value).items() if _changes(v)}
        fields = {k: _split(v, f"{path}.{k}", param, found) for k, v in kept.items()}
        return {"object": type(value).__name__, "fields": fields}
    raise UsageError(
        f"a checkpoint cannot hold '{path}' of the optimizer's state, a "
        f"{type(value).__name__}: set checkpoint=none, or choose another optim"
    )


def _changes(value: Any) -> bool:
    """Whether a field of an object may change as it is used; the others follow from its making."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, Tensor) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def _join(described: Any, path: str, make: Make, own: Any) -> Any:
    """The value that a description is of. own: one made alike, whose objects are filled."""
    if not isinstance(described, dict):
        return described
    (kind, content), *more = described.items()
    if kind == "tensor":
        return make(path, content)
    if kind in ("list", "tuple"):
        items = [_join(item, f"{path}.{i}", make, None) for i, item in enumerate(content)]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        inside = own if isinstance(own, dict) else {}
        return {k: _join(v, f"{path}.{k}", make, inside.get(k)) for k, v in content.items()}
    if kind != "object" or type(own).__name__ != content or not more:
        raise UsageError(
            f"'{path}' in the checkpoint is of kind '{content}', this optimizer keeps a "
            f"{type(own).__name__}: install the versions in constraints.txt"
        )
    for key, value in more[0][1].items():
        if key not in vars(own):
            raise KeyError(f"{path}.{key}")
        setattr(own, key, _join(value, f"{path}.{key}", make, getattr(own, key, None)))
    return own
