"""Batches of a stream: the same whatever the number of ranks; any step may be asked for."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geon.data.order import Batches
from geon.data.readers import Inline, Readers
from geon.data.stream import Recipe
from geon.errors import UsageError

KEPT = 4
"""Steps whose windows and places are kept: the loader reads one ahead of the training."""


@dataclass
class _Live:
    """What is open, and what was read last."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    readers: Inline | Readers | None = None
    next: int = 0
    windows: dict[int, Tensor] = field(default_factory=dict)
    places: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    epoch: int = 0


@dataclass(frozen=True)
class StreamBatches(Batches):
    """Batches of a stream for one rank.

    Each of the stream's parts gives the same number of windows to every batch, and each rank reads
    its contiguous share of the parts: so a batch does not depend on the number of ranks. A step
    that lies behind is read again from where this began; one further on, by reading up to it.

    Attributes:
        recipe: the stream.
        workers: processes of this rank that read ahead; 0 reads where it is asked for.
        places: by part, where to go on at the step that this begins with; None begins anew.
        say: takes a line when an epoch begins, on the rank that speaks.
    """

    recipe: Recipe | None = None
    workers: int = 0
    places: Mapping[int, Mapping[str, Any]] | None = None
    say: Callable[[str], None] | None = field(default=None, compare=False)
    _live: _Live = field(default_factory=_Live, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse parts that ranks, batches or processes do not divide.

        Raises:
            UsageError: names the keys and what divides.
        """
        assert self.recipe is not None
        parts = self.recipe.parts
        if parts % self.world or self.sequences % parts:
            fits = [n for n in range(1, self.sequences + 1)
                    if self.sequences % n == 0 and n % self.world == 0]  # fmt: skip
            words = f"one of {', '.join(map(str, fits[:12]))}" if fits else "a larger batch"
            raise UsageError(
                f"data.streams {parts} must be a multiple of the {self.world} ranks that read, and "
                f"divide the {self.sequences} windows of a batch (data.batch_tokens / "
                f"model.context): set it to {words}"
            )
        if self.workers > parts // self.world:
            raise UsageError(
                f"data.workers {self.workers} is above the {parts // self.world} of data.streams "
                f"{parts} that a rank reads: lower it, or raise data.streams"
            )

    def windows_at(self, step: int) -> Tensor:
        """Windows of this rank at `step`, as `Batches.windows_at` gives them.

        Raises:
            UsageError: a step before the one that this begins with.
        """
        live = self._live
        with live.lock:
            if step not in live.windows:
                if live.readers is None or step < live.next:
                    self._open(step)
                while live.next <= step:
                    self._read()
            return live.windows[step]

    def places_at(self, step: int) -> dict[int, dict[str, Any]] | None:
        """By part of this rank, where `step` is read from; None where nothing has been read.

        What has not been read up to it, is.
        """
        live = self._live
        with live.lock:
            if step == self.begin[0]:
                return None if self.places is None else self._mine()
            if step not in live.places:
                self.windows_at(step - 1)
            return live.places[step]

    def close(self) -> None:
        """End what reads ahead; what is asked for later begins anew."""
        live = self._live
        with live.lock:
            if live.readers is not None:
                live.readers.close()
            live.readers = None
            live.windows, live.places = {}, {}

    def _mine(self) -> dict[int, Any]:
        assert self.recipe is not None
        share = self.recipe.parts // self.world
        mine = range(self.rank * share, (self.rank + 1) * share)
        return {part: self.places[part] if self.places else None for part in mine}

    def _open(self, step: int) -> None:
        assert self.recipe is not None
        if step < self.begin[0]:
            raise UsageError(
                f"step {step} of a stream that begins at step {self.begin[0]}: what lies before it "
                "is not known"
            )
        self.close()
        count = self.sequences // self.recipe.parts
        places, live = self._mine(), self._live
        live.epoch = min((place["epoch"] for place in places.values() if place), default=0)
        live.readers = (
            Readers(self.recipe, places, count, self.workers)
            if self.workers
            else Inline(self.recipe, places, count)
        )
        live.next = self.begin[0]

    def _read(self) -> None:
        live = self._live
        assert live.readers is not None
        found = live.readers.next()
        live.windows[live.next] = torch.from_numpy(found.rows)
        live.places[live.next + 1] = found.places
        for kept in (live.windows, live.places):
            for old in [step for step in kept if step < live.next - KEPT]:
                del kept[old]
        epoch = max(place["epoch"] for place in found.places.values())
        if epoch > live.epoch and self.say is not None:
            live.epoch = epoch
            if epoch & (epoch - 1) == 0:  # each, of a large source; few lines of a small one
                self.say(
                    f"data.dataset: epoch {epoch + 1} begins with the data of step {live.next}"
                )
        live.next += 1
