"""Architectures as transformers stores them, both ways; each model declares its own map.

q, k and v are three weights here, whether a model of ours fuses them or not.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.models.base import LanguageModel

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias|)")
_FUSED = re.compile(r"(.*\bproj_in\.)qkv(\..*)")


@dataclass(frozen=True)
class HFMap:
    """A model of ours by the names of transformers.

    Attributes:
        kind: from a shape to the class of transformers and the `model_type` of its config.
        config: from a shape to the fields of that config, without ids of special tokens; refuses
            by a UsageError what transformers' architecture has not.
        keys: our key behind each field that has one.
        outside: names of modules outside of the blocks.
        inside: names of modules inside of a block. A {} in a name counts the matrices of a batch,
            which are tensors of their own there; then it is the name of the tensor.
        blocks: name of the blocks.
    """

    kind: Callable[[Any], tuple[str, str]]
    config: Callable[[Any], dict[str, Any]]
    keys: Mapping[str, str]
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    blocks: str = "model.layers"


def map_of(model: LanguageModel) -> HFMap:
    """The map of a model.

    Raises:
        UsageError: transformers has no such architecture.
    """
    found = model.hf_map()
    if found is None:
        raise UsageError(
            f"model.arch={model.arch}: transformers has no such architecture; models that say how "
            "they are stored there have a `hf_map` (docs/models.md)"
        )
    return found


def check_config(model: LanguageModel, given: Any) -> None:
    """Refuse a config of transformers that is of another model than ours.

    given: has its fields as attributes.

    Raises:
        UsageError: names the field, both values, and our key.
    """
    found = map_of(model)
    for field, ours in found.config(model.shape).items():
        theirs = getattr(given, field, None)
        if field == "max_position_embeddings":  # rotary positions have no weights
            continue
        if field == "n_inner" and theirs is None:
            theirs = 4 * given.n_embd
        if field == "rope_parameters":
            theirs = {key: (theirs or {}).get(key) for key in ours}
        if theirs != ours:
            key = found.keys.get(field)
            other = f"model={model.arch} has no other"
            mend = f"set model.{key} to what it is there" if key else other
            raise UsageError(f"its {field} is {theirs}, and this run's is {ours}: {mend}")


def exported(model: LanguageModel) -> dict[str, Tensor]:
    """Weights of a folded model by the names of transformers."""
    place, found = map_of(model), {}
    joined: dict[str, list[Tensor]] = {}
    for name, weight in _unfused(model).items():
        theirs, beside = _place(place, name)
        weight = weight.mT if _is_transposed(theirs) else weight
        if "{}" in theirs:
            found |= {theirs.format(i): one.contiguous() for i, one in enumerate(weight)}
        elif beside is None:
            found[theirs] = weight.contiguous()
        else:
            joined.setdefault(theirs, []).append(weight)
    return found | {name: torch.cat(parts, -1) for name, parts in joined.items()}


def _unfused(model: LanguageModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        if fused := _FUSED.fullmatch(name):
            before, behind = fused.groups()
            parts = param.detach().chunk(3)
            found |= {f"{before}{x}{behind}": w for x, w in zip("qkv", parts, strict=True)}
        else:
            found[name] = param.detach()
    return found


def imported(model: LanguageModel, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """A weight of ours from those of transformers.

    name: of our parameter. get: gives a weight by the name of transformers.
    """
    if fused := _FUSED.fullmatch(name):
        before, behind = fused.groups()
        return torch.cat([imported(model, f"{before}{part}{behind}", get) for part in "qkv"])
    theirs, beside = _place(map_of(model), name)
    if "{}" in theirs:
        count = model.get_parameter(name).shape[0]
        return torch.stack([get(theirs.format(i)) for i in range(count)])
    weight = get(theirs)
    if beside is not None:
        weight = weight.chunk(3, -1)[beside]
    return weight.mT if _is_transposed(theirs) else weight


def _place(found: HFMap, name: str) -> tuple[str, int | None]:
    """Name in transformers, and which third of it where q, k and v lie side by side there."""
    if inside := _BLOCK.fullmatch(name):
        block, stem, leaf = inside.groups()
        theirs = f"{found.blocks}.{block}.{found.inside[stem]}{leaf}"
        return theirs, "qkv".index(stem[-1]) if ".c_attn." in theirs else None
    stem, leaf = name.rsplit(".", 1)
    return f"{found.outside[stem]}.{leaf}", None


def _is_transposed(theirs: str) -> bool:
    """Whether it is the weight of a Conv1D, which is stored (d_in, d_out)."""
    return ".c_" in theirs and theirs.endswith(".weight")
