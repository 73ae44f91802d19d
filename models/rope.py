"""Rotary tables, made once; and frequencies that are stretched to longer contexts."""

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("none", "linear", "llama3")


Tables = tuple[Tensor, Tensor]


def made_once(make: Callable[..., Tables]) -> Callable[..., Tables]:
    """Keep the tables of a function of plain numbers and, last, the device.

    They are made outside of inference mode, whose tensors no training may use, whoever asks first;
    a compiled graph holds them as constants.
    """
    kept = lru_cache(maxsize=16)(torch.inference_mode(False)(make))

    @torch.compiler.assume_constant_result
    @wraps(make)
    def table(*args: Any) -> Tables:
        real = type(torch.empty(0, device=args[-1])) is Tensor  # a fake one is of its mode alone
        return (kept if real else make)(*args)

    return table


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


@made_once
def turning_table(time: int, frequencies: tuple[float, ...], device: torch.device) -> Tables:
    """Cosines and sines (T, K/2) of t * frequency in fp32; the sign turns as transformers does."""
    frequency = torch.tensor(frequencies, dtype=torch.float32, device=device)
    angle = torch.arange(time, device=device).float()[:, None] * frequency
    return angle.cos(), -angle.sin()
