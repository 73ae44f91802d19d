"""Processes that read and tokenize the parts of a stream ahead of the training."""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from geon.data.hub import open_dataset
from geon.data.stream import Recipe, Stream
from geon.errors import UsageError

AHEAD = 4
"""Rounds that a process holds ready."""
_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""What is sent to all of a job's processes: those that train decide what follows."""


@dataclass(frozen=True)
class Round:
    """What some parts give at a time: `count` windows each.

    Attributes:
        rows: (parts x count, T + 1) int32, part by part.
        places: by part, where it stands after them.
    """

    rows: np.ndarray
    places: dict[int, dict[str, Any]]


class Inline:
    """Parts that are read where they are asked for."""

    def __init__(
        self, recipe: Recipe, places: Mapping[int, Mapping[str, Any] | None], count: int
    ) -> None:
        """places: by part, where to go on; None begins. count: windows of a part in a round."""
        opened = open_dataset(recipe.where)
        self._parts = {p: Stream(recipe, p, opened, place) for p, place in places.items()}
        self._count = count

    def next(self) -> Round:
        """The next round."""
        rows = [part.windows(self._count) for part in self._parts.values()]
        places = {number: part.place() for number, part in self._parts.items()}
        return Round(np.concatenate(rows), places)

    def close(self) -> None:
        """Nothing to end."""


class Readers:
    """Parts that are read by processes of their own, each with some of the parts."""

    def __init__(
        self,
        recipe: Recipe,
        places: Mapping[int, Mapping[str, Any] | None],
        count: int,
        workers: int,
    ) -> None:
        """As `Inline`. workers: processes, at most as many as parts."""
        context = get_context("spawn")  # a fork would copy a GPU's context, and locks of threads
        self._pipes: list[Connection] = []
        self._processes = []
        for mine in np.array_split(np.array(list(places)), workers):
            ours, theirs = context.Pipe(duplex=False)
            told = (theirs, recipe, {int(p): places[int(p)] for p in mine}, count)
            process = context.Process(target=_serve, args=told, name="geon-reader", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def next(self) -> Round:
        """The next round of all parts.

        Raises:
            UsageError: as a part does.
            RuntimeError: a process failed, or was ended from outside.
        """
        rounds = [self._receive(number) for number in range(len(self._pipes))]
        places = {part: place for one in rounds for part, place in one.places.items()}
        return Round(np.concatenate([one.rows for one in rounds]), places)

    def _receive(self, number: int) -> Round:
        try:
            found = self._pipes[number].recv()
        except (EOFError, OSError):
            self._processes[number].join(5)
            raise RuntimeError(
                f"a process that reads data.dataset ended (exit code "
                f"{self._processes[number].exitcode}): was it killed for memory? A smaller "
                "data.buffer or fewer data.workers take less; the run goes on from its checkpoint"
            ) from None
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Round)
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []


def _serve(
    pipe: Connection,
    recipe: Recipe,
    places: Mapping[int, Mapping[str, Any] | None],
    count: int,
) -> None:
    """Main function of a process: rounds into the pipe until nobody reads it."""
    for name in _IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    ready: queue.Queue[Round | Exception] = queue.Queue(AHEAD)

    def send() -> None:
        with contextlib.suppress(OSError):  # the one that trains has ended
            while True:
                pipe.send(ready.get())
        os._exit(0)

    threading.Thread(target=send, daemon=True).start()
    try:
        parts = Inline(recipe, places, count)
        while True:
            ready.put(parts.next())
    except UsageError as error:
        ready.put(error)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        ready.put(RuntimeError(f"reading data.dataset '{recipe.where.dataset}' failed: {reason}"))
    threading.Event().wait()  # until the error is read, and the pipe closed or this one killed
