"""Which windows step s reads: a function of (seed, step), whatever the world size.

So the whole data state of a run is one integer, the step, and a resume on another number of ranks
reads the same tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geon.data.corpus import Split
from geon.errors import UsageError

_ROUNDS = 4  # Luby and Rackoff: four rounds of a Feistel network make a strong permutation


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash 64-bit words (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, length: int, key: int) -> np.ndarray:
    """Apply a keyed permutation of range(length) to some indices, in O(1) memory.

    A Feistel network permutes the smallest 4^b >= length; indices that land outside walk on
    until they are inside, which keeps it a permutation.
    """
    half = max(1, (max(length - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    # Hashed, because keys that differ by a little would otherwise give rounds that do too.
    rounds = _mix(_mix(np.full(_ROUNDS, key, np.uint64)) + np.arange(_ROUNDS, dtype=np.uint64))
    out = index.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo = out >= length
    return out.astype(np.int64)


def sample_index(seed: int, first: int, count: int, windows: int, shuffle: bool) -> np.ndarray:
    """Window numbers of samples first, first + 1, ...: every epoch reads each window once.

    Shapes: returns (count,) int64 in [0, windows).
    """
    position = np.arange(first, first + count, dtype=np.int64)
    epoch, within = position // windows, position % windows
    if not shuffle:
        return within
    out = np.empty_like(within)
    for e in np.unique(epoch):
        chosen = epoch == e
        key = (seed * 1_000_003 + int(e)) % 2**40
        out[chosen] = permute(within[chosen], windows, key)
    return out


def check_windows(split: Split, context: int) -> None:
    """Refuse tokens that do not fill one window.

    Raises:
        UsageError: names them, and model.context.
    """
    if len(split) <= context:
        raise UsageError(
            f"{split.name} has {len(split)} tokens, too few for one window of "
            f"model.context {context} + 1: give more text or lower model.context"
        )


@dataclass(frozen=True)
class Batches:
    """Batches of token windows for one rank.

    Attributes:
        split: the tokens.
        context: window length T; a window is T + 1 tokens, inputs and shifted targets.
        sequences: windows in a global batch.
        rank, world: which contiguous slice of the batch is this rank's.
        micro: windows in one forward pass of one rank.
        seed, shuffle: order of the windows; without shuffle, the order of the text.
        begin: a step, and the window of the endless order that it starts with: others follow it.
    """

    split: Split
    context: int
    sequences: int
    rank: int
    world: int
    micro: int
    seed: int = 0
    shuffle: bool = True
    begin: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_windows(self.split, self.context)

    @property
    def windows(self) -> int:
        """Windows in one epoch."""
        return self.split.windows(self.context)

    @property
    def accumulation(self) -> int:
        """Forward passes of this rank in one step."""
        return self.sequences // (self.world * self.micro)

    def first(self, step: int) -> int:
        """Window of the endless order that a step starts with, over all ranks."""
        return self.begin[1] + (step - self.begin[0]) * self.sequences

    def windows_at(self, step: int) -> Tensor:
        """Windows of this rank at `step`: (sequences / world, T + 1) int32, inputs and targets."""
        share = self.sequences // self.world
        first = self.first(step) + self.rank * share
        index = sample_index(self.seed, first, share, self.windows, self.shuffle)
        rows = np.empty((share, self.context + 1), dtype=np.int32)
        for row, i in zip(rows, index, strict=True):
            row[:] = self.split.window(int(i) * self.context, self.context + 1)
        return torch.from_numpy(rows)

    def close(self) -> None:
        """End what reads ahead, where anything does."""

    def pairs(self, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches of what `windows_at` gave, on its device: int64 (micro, T) each.

        Returns: inputs, and targets, which are a token ahead.
        """
        return [(part[:, :-1].long(), part[:, 1:].long()) for part in windows.split(self.micro)]

    def step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches of this rank at `step`: pairs (micro, T) of int64 inputs and targets."""
        return self.pairs(self.windows_at(step))
