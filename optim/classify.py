"""The roles of a model that somebody else wrote: by module type, name, and what is said of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from geon.errors import UsageError, nearest
from geon.optim.declare import Declared, stored
from geon.optim.families import Place, classes, read
from geon.optim.last_layers import WRAPPERS, bare, last_layers
from geon.optim.roles import ParamInfo, Role

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
        raise UsageError(explain(unsure))
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


def _declared(said: Override) -> Declared:
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
    modules = dict(model.named_modules())
    found: dict[int, list[Place]] = defaultdict(list)
    for path, module in modules.items():
        if "FullyShardedDataParallel" in classes(module):
            raise UsageError(
                f"module '{path or type(module).__name__}' is wrapped by FullyShardedDataParallel, "
                "which cuts matrices into flat pieces: shard by fully_shard (FSDP2)"
            )
        parts = path.split(".") if path else []
        if "lora_B" in parts:  # its rows are those of the weight that it adapts
            parts = parts[: parts.index("lora_B")]
        around = [(".".join(parts[:end]), parts[end]) for end in reversed(range(len(parts)))]
        kept = [(above, child) for above, child in around if not WRAPPERS.fullmatch(child)]
        child = kept[0][1] if kept else ""
        parents = tuple(modules[above] for above, _ in kept)
        for leaf, param in module.named_parameters(recurse=False):
            place = Place(leaf, tuple(param.shape), module, child, parents)
            found[id(param)].append(place)
    return found


def _roles(model: nn.Module) -> dict[int, ParamInfo]:
    """What modules declare by a method `roles()`, the outermost first."""
    found: dict[int, ParamInfo] = {}
    for path, module in model.named_modules():
        if not callable(getattr(module, "roles", None)):
            continue
        own, said = dict(module.named_parameters()), module.roles()
        pairs = said.items() if isinstance(said, Mapping) else ((i.name, i) for i in said)
        for name, one in pairs:
            if name not in own:
                raise UsageError(
                    f"roles() of {path or type(module).__name__} declares '{name}', which it does "
                    f"not have.{nearest(name, list(own))}"
                )
            shape = tuple(own[name].shape)
            info = one if isinstance(one, ParamInfo) else _declared(one).info(name, shape)
            if tuple(info.shape) != shape:
                raise UsageError(
                    f"roles() of {path or type(module).__name__} declares '{name}' with shape "
                    f"{tuple(info.shape)}, but it has {shape}"
                )
            found.setdefault(id(own[name]), info)
    return found


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
        if is_head and not (isinstance(answer, Declared) and answer.role is Role.EMBEDDING):
            answer = Declared(Role.HEAD)
        if answer not in found:
            found.append(answer)
    roles = {one.role for one in found if isinstance(one, Declared)}
    if Role.EMBEDDING in roles and len(found) > 1 and roles <= {*_OF_LINEAR, Role.EMBEDDING}:
        return Declared(Role.TIED)
    return found[0] if len(found) == 1 else "modules of different types share it"


_OF_LINEAR = (Role.HEAD, Role.HIDDEN)


def _vector(place: Place) -> Declared:
    if "bias" in place.leaf:
        return Declared(Role.BIAS)
    normal = any("norm" in name.lower() for name in classes(place.module)[:-2])
    return Declared(Role.GAIN if normal else Role.OTHER)


# What to say.


def explain(unsure: Unsure) -> str:
    """All parameters that are unsure, those of one kind together, each with a line to write."""
    kinds: dict[tuple[str, tuple[int, ...], str], list[tuple[str, Place]]] = defaultdict(list)
    for name, (place, reason) in unsure.items():
        glob = ".".join("*" if part.isdigit() else part for part in bare(name).split("."))
        kinds[glob, place.shape, reason].append((name, place))
    lines = [f"unsure about {len(unsure)} parameters. Say in overrides what they are:"]
    for (glob, shape, reason), members in kinds.items():
        count = f", {len(members)} of them" if len(members) > 1 else ""
        lines.append(f"  '{members[0][0]}' {shape}{count}: {reason}")
        lines.append(f'    "{glob}": {_line(members[0][1])},')
    lines.append(
        "as classify(model, overrides={...}) or build(model, ..., overrides={...}); or declare "
        "them in a method roles() of the model; or fallback=True steps them by AdamW"
    )
    return "\n".join(lines)


def _line(place: Place) -> str:
    """What could be written for a parameter."""
    shape = place.shape
    if len(shape) == 2 and place.leaf == "weight":
        turned = "Conv1D" in classes(place.module)
        rows, cols = shape[::-1] if turned else shape
        also = ", transposed=True" if turned else ""
        if rows % 3 == 0 and ("qkv" in place.child.lower() or rows == 3 * cols):
            third = rows // 3
            return f"fused(q={third}, k={third}, v={third}{also})  # interleaved=heads if by head"
        if rows % 2 == 0:
            return f"fused(a={rows // 2}, b={rows // 2}{also})  # or stored(), if it is one matrix"
        return "stored()  # one matrix; or fused(a=.., b=..)"
    if len(shape) == 3:
        return 'stored()  # (n, d_out, d_in); or stored(transposed=True), fused(..), "other"'
    return '"other"  # AdamW; or "embedding", "head", stored()'
