"""Batches of text as token ids, by processes, in order."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import Any, NamedTuple

import numpy as np

from geon.data.codec import Codec, load_codec
from geon.data.meta import SPLITS
from geon.errors import UsageError


class Piece(NamedTuple):
    """Text for one split. begins: a document, and not the rest of one."""

    text: str
    val: bool
    begins: bool


class Encoded(NamedTuple):
    """Of each split: ids, documents that begin, and bytes; and the seconds it took."""

    splits: dict[str, tuple[np.ndarray, int, int]]
    cpu: float


def encoded(
    batches: Iterable[tuple[list[Piece], Any]], codec: Codec, workers: int
) -> Iterator[tuple[Encoded, Any]]:
    """Encode batches, each with what comes with it, in their order.

    workers: processes; 1 encodes in this one.

    Raises:
        UsageError: a process was ended from outside.
    """
    if workers == 1:
        for batch, there in batches:
            yield _encode(batch, codec), there
        return
    waiting: deque[tuple[Future[Encoded], Any]] = deque()
    # A fork of this process would copy its threads' locks; a server of forks imports once for all.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, "geon.data.bpe"])
        _start_server()
    pool = ProcessPoolExecutor(workers, context, _begin, (codec.serialise(),))
    try:
        for batch, there in batches:
            with _interrupt_held():  # it starts a process, which must not be half known
                waiting.append((pool.submit(_work, batch), there))
            if len(waiting) > 2 * workers:
                found, there = waiting.popleft()
                yield found.result(), there
        while waiting:
            found, there = waiting.popleft()
            yield found.result(), there
    except BrokenProcessPool:
        raise UsageError(
            "a process that encodes has ended: was it killed for memory? What is done is kept; run "
            "the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


def _start_server() -> None:
    """Start the server of forks deaf to Ctrl-C, which reaches it too, while it still imports."""
    from multiprocessing import forkserver

    if threading.current_thread() is not threading.main_thread():
        return  # signals are set there alone; the server is started as it is needed
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _encode(batch: Sequence[Piece], codec: Codec) -> Encoded:
    start = time.process_time()
    kind = np.uint16 if codec.vocab_size <= 1 << 16 else np.uint32
    begin = np.array([] if codec.eot is None else [codec.eot], kind)
    found = {}
    for name in SPLITS:
        ids, documents, size = [np.empty(0, kind)], 0, 0
        for piece in batch:
            if piece.val is (name == "val"):
                if piece.begins:
                    ids.append(begin)
                    documents += 1
                ids.append(codec.encode(piece.text).astype(kind))
                size += len(piece.text.encode())
        found[name] = np.concatenate(ids), documents, size
    return Encoded(found, time.process_time() - start)


_codec_here: Codec | None = None


def _begin(serialised: str) -> None:
    """Begin a process that encodes: it ends with the one that writes, and by nothing else."""
    global _codec_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _codec_here = load_codec(serialised)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(batch: Sequence[Piece]) -> Encoded:
    assert _codec_here is not None
    return _encode(batch, _codec_here)
