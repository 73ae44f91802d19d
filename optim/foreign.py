"""The roles of a model that somebody else wrote: by module type, name, and what is said of it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from torch import nn

from geon.errors import UsageError, nearest
from geon.optim.declare import Declared, stored
from geon.optim.families import is_norm, read
from geon.optim.last_layers import last_layers
from geon.optim.place import Place
from geon.optim.roles import ParamInfo, Role
from geon.optim.tree import Tree, bare, classes

Override = Declared | Role | str


def classify(
    model: nn.Module,
    overrides: Mapping[str, Override] | None = None,
    fallback: bool = False,
) -> list[ParamInfo]:
    """Declare the role of every parameter of a model, and how it is stored.

    First what `overrides` says, then the `roles()` of the model or of a module in it, then the
    type of the module that holds the parameter and the layouts in `families.py`. A Linear is a head
    if it is the model's output embedding, has the name of a last layer, is the last Linear of an
    outermost Sequential, or as wide as the vocabulary; tied if an Embedding shares its weight.
    What has one dimension, or does not require a gradient and is of no known type, is no matrix.

    overrides: glob over names -> a role, or `fused(...)` or `stored(...)`. Names may be given
        without what wrappers put into them. The first glob that matches decides.
    fallback: give what nothing sure can be said of the role other, which AdamW steps.

    Returns: in the order of `named_parameters()`, without what is not floating point.

    Raises:
        UsageError: parameters that nothing sure can be said of, all in one message with what to
            say; a glob without a parameter; parameters in pieces that are not DTensors.
    """
    infos, unsure = classified(model, overrides or {})
    if unsure and not fallback:
        raise UsageError(explain(unsure, [info.name for info in infos]))
    return infos


Unsure = dict[str, tuple[Place, str]]
"""Where a parameter is of which nothing sure can be said, and why, by name."""


def classified(
    model: nn.Module, overrides: Mapping[str, Override]
) -> tuple[list[ParamInfo], Unsure]:
    """Classify a model; return also what nothing sure can be said of, which is of the role other.

    Raises:
        UsageError: a glob without a parameter; parameters in pieces that are not DTensors.
    """
    if not isinstance(overrides, Mapping) or not all(isinstance(glob, str) for glob in overrides):
        raise UsageError(f"overrides must map globs to roles, stored(..) or fused(..): {overrides}")
    said = {glob: _declared(one) for glob, one in overrides.items()}
    names = {id(param): name for name, param in model.named_parameters()}
    places, declared = _places(model), _roles(model)
    _check_globs(said, names.values())
    heads = last_layers(model)
    found, unsure = [], Unsure()
    for key, name in names.items():
        param = model.get_parameter(name)
        _check_whole(name, param)
        shape = tuple(param.shape)
        if not param.is_floating_point():
            continue
        if (own := _overriding(said, name)) is not None:
            found.append(own.info(name, shape))
        elif key in declared:
            found.append(replace(declared[key], name=name))
        elif isinstance(answer := _answer(places[key], key in heads), Declared):
            found.append(answer.info(name, shape))
        else:
            found.append(ParamInfo(name, shape, Role.OTHER))
            if param.requires_grad:
                unsure[name] = places[key][0], answer
    return found, unsure


def _declared(said: Any) -> Declared:
    if not isinstance(said, Declared | str):
        raise UsageError(
            f"overrides and roles() map to a role, stored(...) or fused(...), not {said!r:.80}"
        )
    return said if isinstance(said, Declared) else stored(said)


def _overriding(overrides: Mapping[str, Declared], name: str) -> Declared | None:
    for glob, said in overrides.items():
        if fnmatchcase(name, glob) or fnmatchcase(bare(name), glob):
            return said
    return None


def _check_globs(overrides: Mapping[str, Any], names: Iterable[str]) -> None:
    names = list(names)
    for glob in overrides:
        if not any(fnmatchcase(name, glob) or fnmatchcase(bare(name), glob) for name in names):
            raise UsageError(
                f"overrides: '{glob}' matches no parameter.{nearest(glob, names)} Names are as in "
                "named_parameters(), and a glob matches the whole of one"
            )


def _check_whole(name: str, param: Any) -> None:
    """Refuse parameters that a framework has cut or emptied without saying so."""
    if hasattr(param, "ds_id"):
        raise UsageError(
            f"parameter '{name}' belongs to DeepSpeed ZeRO-3: classify the model before "
            "deepspeed.initialize, and see docs/library.md for the optimizer"
        )
    if hasattr(param, "_is_flat_param") or name.endswith("_flat_param"):
        raise UsageError(
            f"parameter '{name}' is flattened by FullyShardedDataParallel, so its matrices are "
            "gone: shard by torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """Every place of each parameter, by its identity; a tied one has several."""
    tree = Tree(model)
    found: dict[int, list[Place]] = defaultdict(list)
    for path, module in model.named_modules():
        if "FullyShardedDataParallel" in classes(module):
            raise UsageError(
                f"module '{path or type(module).__name__}' is wrapped by FullyShardedDataParallel, "
                "which cuts matrices into flat pieces: shard by fully_shard (FSDP2)"
            )
        # The rows of an adapter's B are those of the weight that it adapts.
        own = re.sub(r"\.lora_B\..*", "", bare(path))
        around = tuple(tree.above(own))
        for leaf, param in module.named_parameters(recurse=False):
            if isinstance(param, nn.parameter.UninitializedParameter):
                raise UsageError(
                    f"parameter '{path}.{leaf}' has no shape yet: pass a batch through the model "
                    "before the optimizer is made"
                )
            found[id(param)].append(Place(leaf, tuple(param.shape), module, own, around))
    return found


def _roles(model: nn.Module) -> dict[int, ParamInfo]:
    """What modules declare by a method `roles()`, the outermost first."""
    found: dict[int, ParamInfo] = {}
    for path, module in model.named_modules():
        # Of the class: wrappers hand attributes of what they wrap on, but names differ.
        method = getattr(type(module), "roles", None)
        if not callable(method) or len(signature(method).parameters) != 1:
            continue
        where = f"roles() of {path or type(module).__name__}"
        own, seen = dict(module.named_parameters()), set[str]()
        for name, one in _said(module.roles(), where):
            if name not in own:
                raise UsageError(
                    f"{where} declares '{name}', which it does not have.{nearest(name, list(own))}"
                )
            shape = tuple(own[name].shape)
            info = one if isinstance(one, ParamInfo) else _declared(one).info(name, shape)
            if tuple(info.shape) != shape or name in seen:
                raise UsageError(
                    f"{where} declares '{name}' "
                    + (f"with shape {tuple(info.shape)}, but it has {shape}", "twice")[name in seen]
                )
            seen.add(name)
            found.setdefault(id(own[name]), info)
    return found


def _said(said: Any, where: str) -> list[tuple[str, Any]]:
    """What a method `roles()` returned: pairs of names and declarations."""
    if isinstance(said, Mapping):
        return list(said.items())
    infos = list(said) if isinstance(said, Iterable) and not isinstance(said, str) else [said]
    if not all(isinstance(info, ParamInfo) for info in infos):
        raise UsageError(
            f"{where} returned {said!r:.80}, expected a list of ParamInfo, or a mapping from names "
            "to roles, stored(...) or fused(...)"
        )
    return [(info.name, info) for info in infos]


def _answer(places: Sequence[Place], is_head: bool) -> Declared | str:
    """What a parameter is at all of its places: one declaration, or words."""
    shape = places[0].shape
    if shape in ((), (1,)):
        return Declared(Role.SCALAR)
    if len(shape) == 1:
        return _vector(places[0])
    found: list[Declared | str] = []
    for place in places:
        answer = read(place)
        if is_head and not (isinstance(answer, Declared) and answer.role in _ENDS):
            answer = Declared(Role.HEAD if len(shape) == 2 else Role.OTHER)
        if answer not in found:
            found.append(answer)
    roles = {one.role for one in found if isinstance(one, Declared)}
    if Role.EMBEDDING in roles and len(found) > 1 and roles <= {*_OF_LINEAR, Role.EMBEDDING}:
        return Declared(Role.TIED)
    return found[0] if len(found) == 1 else "modules of different types share it"


_OF_LINEAR = (Role.HEAD, Role.HIDDEN)
_ENDS = (Role.HEAD, Role.EMBEDDING)


def _vector(place: Place) -> Declared:
    if "bias" in place.leaf:
        return Declared(Role.BIAS)
    return Declared(Role.GAIN if is_norm(place.module) else Role.OTHER)


# What to say.


def explain(unsure: Unsure, names: Iterable[str] = ()) -> str:
    """All parameters that are unsure, those of one kind together, each with a line to write.

    names: of all parameters: a glob is only written where it matches none but its own.
    """
    kinds: dict[tuple[str, tuple[int, ...], str], list[tuple[str, Place]]] = defaultdict(list)
    for name, (place, reason) in unsure.items():
        glob = ".".join("*" if part.isdigit() else part for part in bare(name).split("."))
        kinds[glob, place.shape, reason].append((name, place))
    lines = [f"unsure about {len(unsure)} parameters. Say in overrides what they are:"]
    for (glob, shape, reason), members in kinds.items():
        own = [bare(name) for name, _ in members]
        count = f", {len(members)} of them" if len(members) > 1 else ""
        lines.append(f"  '{members[0][0]}' {shape}{count}: {reason}")
        alone = all(bare(name) in own for name in names if fnmatchcase(bare(name), glob))
        said, comment = _line(members[0][1])
        lines += [f'    "{key}": {said},{comment}' for key in ([glob] if alone else own)]
    lines.append(
        "as classify(model, overrides={...}) or build(model, ..., overrides={...}); or declare "
        "them in a method roles() of the model; or fallback=True leaves them to AdamW"
    )
    return "\n".join(lines)


def _line(place: Place) -> tuple[str, str]:
    """What could be written for a parameter, and a comment."""
    shape, module = place.shape, place.module
    if len(shape) == 2 and place.leaf == "weight":
        turned = "Conv1D" in classes(module)
        rows, cols = shape[::-1] if turned else shape
        also = ", transposed=True" if turned else ""
        if rows == 3 * cols:
            parts = f"q={cols}, k={cols}, v={cols}"
            also += "" if place.child == "qkv" else ", interleaved=..."
            return (
                f"fused({parts}{also})",
                "  # interleaved=HEADS if q, k, v come head by head, or 0",
            )
        return f"fused(a=..., b=...{also})", f"  # sizes of its {rows} rows; stored() if it is one"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"stored(kernel={len(shape) - 2}, splits=(..., ...))", "  # splits of d_out"
    if len(shape) == 3:
        return '"other"', "  # AdamW; stored() for (n, d_out, d_in), stored(transposed=True)"
    return '"other"', '  # AdamW; or "embedding", "head", stored()'
