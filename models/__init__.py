"""Architectures: one file each; the table below is the only registry."""

from geon.models.base import LanguageModel, ModelShape
from geon.models.gpt import GPT
from geon.models.gpt2 import GPT2
from geon.models.gpt_track3 import GPTTrack3
from geon.models.loss import IGNORED

MODELS: dict[str, type[LanguageModel]] = {"gpt": GPT, "gpt2": GPT2, "gpt_track3": GPTTrack3}

__all__ = ["GPT", "GPT2", "IGNORED", "GPTTrack3", "MODELS", "LanguageModel", "ModelShape"]
