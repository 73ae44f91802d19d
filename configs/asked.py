"""What an architecture says of itself where a config is checked: roles, heads, options."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from geon.configs.schema import ModelConfig
from geon.errors import UsageError


@dataclass(frozen=True)
class Facts:
    """Facts about a model.

    Attributes:
        fields: its sizes and options.
        roles: of its parameters.
        attends: whether some of them have heads.
        wide: whether a hidden one is a matrix of more columns than rows.
        blocks: whether it has blocks that are run one by one.
        stored: whether transformers has it.
    """

    fields: frozenset[str]
    roles: frozenset[str]
    attends: bool
    wide: bool
    blocks: bool
    stored: bool


def facts(config: ModelConfig) -> Facts | None:
    """Facts about the model of a config, of its first two layers; None where it cannot be made."""
    few = {"n_layer": min(config.n_layer, 2), "vocab_size": max(config.vocab_size, 1)}
    keys = asdict(config) | few
    return _facts(json.dumps(keys, sort_keys=True, default=lambda word: word.value))


@lru_cache(maxsize=64)
def _facts(keys: str) -> Facts | None:
    import torch  # not for who only reads a config

    from geon.models import ARCHITECTURES, shape_of

    try:
        shape = shape_of(json.loads(keys))
        with torch.device("meta"):
            model = ARCHITECTURES[shape.arch](shape)
    except UsageError:
        return None
    return Facts(
        frozenset(asdict(shape)),
        frozenset(info.role.value for info in model.infos),
        any(info.heads for info in model.infos),
        any(info.role.value == "hidden" and _wide(info.shape) for info in model.infos),
        bool(model.shard_units()),
        model.hf_map() is not None,
    )


def _wide(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] < shape[1]
