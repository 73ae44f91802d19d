"""Processes that read and tokenize the parts of a stream ahead of the training."""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from geon.data.hf import open_dataset
from geon.data.stream import Recipe, Stream
from geon.errors import UsageError

AHEAD = 4
"""Rounds that a process holds ready."""
_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""What is sent to all of a job's processes: those that train decide what follows."""

_CODE = """
import signal, sys
for name in {ignored!r}:
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
sys.path[:] = {path!r}
from geon.data.readers import serve
serve({number})
"""
"""A process of its own, not of `multiprocessing`: that would import the program again, and a fork
would copy a GPU's context and the locks of threads. Signals are ignored before the imports, which
take a second."""


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
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for mine in np.array_split(np.array(list(places)), workers):
            ours, theirs = socket.socketpair()
            code = _CODE.format(ignored=_IGNORED, path=sys.path, number=theirs.fileno())
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
            theirs.close()
            self._pipes.append(Connection(ours.detach()))
            self._pipes[-1].send((recipe, {int(p): places[int(p)] for p in mine}, count))

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
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[number].wait(5)
            raise RuntimeError(
                f"a process that reads data.dataset ended (exit status "
                f"{self._processes[number].returncode}): was it killed for memory? A smaller "
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
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes = [], []


def serve(number: int) -> None:
    """Main function of a process: rounds into a pipe until nobody reads it.

    number: of the pipe's file; its first message says what to read.
    """
    pipe = Connection(number)
    recipe, places, count = pipe.recv()
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
