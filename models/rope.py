"""Rotary tables of frequencies that are stretched to longer contexts."""

import math
from functools import lru_cache

import torch
from torch import Tensor

SCALINGS = ("none", "linear", "llama3")


def slowed(
    frequency: float, scaling: str, factor: float, low: float, high: float, original: int
) -> float:
    """A frequency, radians a token, for a context that is `factor` times as long.

    scaling: linear divides every frequency by `factor`; llama3 those that make fewer than `low`
        waves in the `original` context, none that make more than `high`, and goes evenly from one
        to the other (Llama 3.1, arXiv 2407.21783).
    """
    if scaling == "none":
        return frequency
    if scaling == "linear":
        return frequency / factor
    waves = original * frequency / (2 * math.pi)
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return share * frequency + (1 - share) * frequency / factor


@torch.compiler.assume_constant_result
def turning_table(
    time: int, frequencies: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, K/2) of t * frequency in fp32; the sign turns as transformers does."""
    real = type(torch.empty(0, device=device)) is Tensor  # a fake one is of its mode alone
    return (_kept_table if real else _turning_table)(time, frequencies, device)


def _turning_table(
    time: int, frequencies: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    frequency = torch.tensor(frequencies, dtype=torch.float32, device=device)
    angle = torch.arange(time, device=device).float()[:, None] * frequency
    return angle.cos(), -angle.sin()


# Outside of inference mode, whose tensors no training may use, whoever asks first.
_kept_table = lru_cache(maxsize=16)(torch.inference_mode(False)(_turning_table))
