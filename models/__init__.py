"""Architectures: one file each; the tables below are the only registries."""

from geon.models.base import LanguageModel, ModelShape
from geon.models.gpt import GPT
from geon.models.gpt2 import GPT2
from geon.models.gpt_track3 import GPTTrack3
from geon.models.images import IMAGE_MODELS, ImageModel
from geon.models.loss import IGNORED

MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "gpt2": GPT2, "gpt_track3": GPTTrack3}
"""Language models."""
ARCHITECTURES: dict[str, type[LanguageModel]] = {**MODELS, **IMAGE_MODELS}

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
    "ModelShape",
]
