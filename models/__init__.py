"""Architectures: one file each; the tables below are the only registries."""

from collections.abc import Mapping
from typing import Any

from geon.errors import UsageError
from geon.models.base import LanguageModel
from geon.models.gpt import GPT, GPTShape
from geon.models.gpt2 import GPT2
from geon.models.gpt_track3 import GPTTrack3
from geon.models.images import IMAGE_MODELS, ImageModel
from geon.models.llama import Llama
from geon.models.loss import IGNORED
from geon.models.moe import MoE
from geon.models.shapes import Shape

MODELS: dict[str, type[LanguageModel]] = {
    model.shape_type.arch: model for model in (GPT, GPT2, GPTTrack3, Llama, MoE)
}
"""Language models."""
ARCHITECTURES: dict[str, type[LanguageModel]] = {**MODELS, **IMAGE_MODELS}

ModelShape = GPTShape
"""A shape that every architecture takes: one of another reads the fields that it has."""

_OF_CONFIG = ("arch", "head_dim", "init_from", "options")
"""Keys of `model` that are no fields of a shape."""


def shape_of(keys: Mapping[str, Any]) -> Shape:
    """The shape that the keys of a config's `model` describe; words of enums are their values.

    Raises:
        UsageError: an architecture that there is not, an option that it has not, bad sizes.
    """
    keys = {key: getattr(value, "value", value) for key, value in keys.items()}
    arch = keys["arch"]
    if arch not in ARCHITECTURES:
        raise UsageError(f"model.arch={arch}: there is none; choose {', '.join(ARCHITECTURES)}")
    kind, common = ARCHITECTURES[arch].shape_type, set(keys) - set(_OF_CONFIG)
    kind.check_options(keys["options"], common)
    return kind.of({key: keys[key] for key in common} | keys["options"])


__all__ = [
    "ARCHITECTURES",
    "GPT",
    "GPT2",
    "IGNORED",
    "IMAGE_MODELS",
    "MODELS",
    "GPTTrack3",
    "ImageModel",
    "LanguageModel",
    "Llama",
    "MoE",
    "ModelShape",
    "Shape",
    "shape_of",
]
