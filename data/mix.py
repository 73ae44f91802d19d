"""Several corpora read as one: whose window a sample is, and which of its windows, in closed form.

So the state of a mixture is the step, as of one source, whatever the number of ranks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

from geon.data.corpus import Corpus, Split
from geon.data.order import Batches, check_windows, sample_index
from geon.errors import UsageError

SLOTS = 10_000
"""Samples after which the schedule of a mixture begins again: weights are exact to a part of it."""


class Schedule:
    """Whose sample each one of an endless order is.

    Among SLOTS samples each source has its share of them, by largest remainder; its samples lie as
    evenly as they can: the j-th of c at (j + 1/2) / c of the way, ties to the source named first.

    Raises:
        UsageError: a weight too small for one sample among SLOTS.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        whole = sum(map(Fraction, weights.values()))
        exact = [Fraction(weight) * SLOTS / whole for weight in weights.values()]
        self.counts = np.array([int(count) for count in exact])
        rest = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])  # largest first
        self.counts[rest[: SLOTS - int(self.counts.sum())]] += 1
        for name, count in zip(weights, self.counts, strict=True):
            if count == 0:
                raise UsageError(
                    f"data.mix.{name}.weight {weights[name]} is less than one window in {SLOTS} "
                    "beside the others: give it more, or leave it out"
                )
        who = np.repeat(np.arange(len(self.counts)), self.counts)
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        self._source = who[np.lexsort((who, place))]
        self._before = np.empty(SLOTS, np.int64)
        for source, count in enumerate(self.counts):
            self._before[self._source == source] = np.arange(count)

    def at(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of some samples, and how many samples of that source come before each.

        Shapes: (count,) int64 to two of the same.
        """
        period, slot = np.divmod(index, SLOTS)
        source = self._source[slot]
        return source, period * self.counts[source] + self._before[slot]


@cache
def _schedule(weights: tuple[tuple[str, float], ...]) -> Schedule:
    return Schedule(dict(weights))


@dataclass(frozen=True)
class MixedBatches(Batches):
    """Batches of windows of several sources.

    Attributes:
        parts: training tokens of each source by name.
        weights: share of the samples of each; they need not sum to one.
    """

    parts: tuple[tuple[str, Split], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for _, split in self.parts:
            check_windows(split, self.context)

    def windows_at(self, step: int) -> Tensor:
        """Windows of this rank at `step`, as `Batches.windows_at` gives them."""
        share = self.sequences // self.world
        first = self.first(step) + self.rank * share
        source, before = _schedule(self.weights).at(np.arange(first, first + share))
        rows = np.empty((share, self.context + 1), dtype=np.int32)
        for number, (_, split) in enumerate(self.parts):
            (mine,) = np.nonzero(source == number)
            if not len(mine):
                continue
            windows = (len(split) - 1) // self.context
            index = sample_index(self.seed, int(before[mine[0]]), len(mine), windows, self.shuffle)
            for row, i in zip(mine, index, strict=True):
                rows[row] = split.window(int(i) * self.context, self.context + 1)
        return torch.from_numpy(rows)


def mixed_corpus(parts: Mapping[str, Corpus], weights: Mapping[str, float]) -> Corpus:
    """One corpus of several, which all read their text by the same tokenizer.

    Raises:
        UsageError: other tokenizers, the same data twice, or a weight too small.
    """
    _check_alike(parts)
    counts = _schedule(tuple(weights.items())).counts
    shares = {name: int(count) / SLOTS for name, count in zip(parts, counts, strict=True)}
    digest = hashlib.sha256()
    for name, part in parts.items():
        digest.update(f"{name} {part.facts['sha256']} ".encode())
    first = next(iter(parts.values()))
    words = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
    told = ("name", "no text")  # may hold paths of a host, and ranks compare the rest
    facts = {
        name: {key: value for key, value in part.facts.items() if key not in told}
        for name, part in parts.items()
    }
    return Corpus(
        train=_joined("training tokens of data.mix", [part.train for part in parts.values()]),
        val=_joined("validation tokens of data.mix", [part.val for part in parts.values()]),
        vocab_size=max(part.vocab_size for part in parts.values()),
        codec=first.codec,
        val_text=b"",
        facts={
            "name": f"a mixture of {words}",
            "shares": shares,
            "sources": facts,
            "sha256": digest.hexdigest(),
        },
        parts=dict(parts),
        shares=shares,
    )


def _joined(name: str, splits: Sequence[Split]) -> Split:
    return Split(name, [segment for split in splits for segment in split.segments])


def _check_alike(parts: Mapping[str, Corpus]) -> None:
    known: dict[str, tuple[str, str]] = {}
    hashes: dict[str, str] = {}
    for name, part in parts.items():
        if (twin := hashes.setdefault(part.facts["sha256"], name)) != name:
            raise UsageError(
                f"data.mix.{name} and data.mix.{twin} are the same data: leave one out, and give "
                "the other the weight of both"
            )
        serialised = part.codec.serialise() if part.codec else ""
        words = _words(part)
        known.setdefault(serialised, (name, words))
        if len(known) > 1:
            (first, said), _ = known.values()
            raise UsageError(
                f"data.mix.{first} is of {said} and data.mix.{name} of {words}: an id must mean "
                "the same in all sources; read them by one tokenizer"
            )


def _words(part: Corpus) -> str:
    if part.codec is None:
        return "ids whose tokenizer is not known"
    serialised = part.codec.serialise()
    digest = hashlib.sha256(serialised.encode()).hexdigest()[:12]
    return "bytes" if serialised == "bytes" else f"a tokenizer of {part.vocab_size} ids ({digest})"
