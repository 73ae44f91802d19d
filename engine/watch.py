"""Ranks that are gone or stuck: every other rank says which, where and in what, and ends.

Each rank leaves word of where it stands in the store, once a second, from a thread. When a
collective fails, what the others left tells who is to blame. The thread also ends a rank whose
peers are gone while it waits for them, and one that does not move any more.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from geon.engine.parallel import Parallel
from geon.engine.trainer import Trainer
from geon.errors import ExchangeError, Preempted, RankLost

TICK = 1.0
"""Seconds between two words of a rank."""

GRACE = 2.0
"""Seconds in which the training thread may find out by itself, and say more."""

SILENT = 2.5
"""Seconds without a word after which a rank counts as gone, once a collective has failed."""

STUCK = 2.0
"""Time without progress within a step, in units of parallel.timeout_seconds."""

EARLIER = 5.0
"""Seconds before the timeout in which a rank on a GPU says where all stand: NCCL then ends the
process from within, and nothing is raised that could be explained."""

PATIENCE = 10.0
"""The same for what may take long: the first step, which compiles, an evaluation, a checkpoint."""

_STEP = ("forward", "backward", "update")
_NAMING = ("distributed_c10d.py", "_functional_collectives.py")
_SAID_BY_TRANSPORTS = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|broken pipe|timed out|socket", re.IGNORECASE
)
_ERRORS = (ExchangeError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)


class Watch:
    """A context around a run, from when it has joined the others.

    Raises, at its end:
        RankLost: in place of what a failed collective raises.
    """

    def __init__(self, parallel: Parallel) -> None:
        """Nothing starts before the context is entered."""
        self._trainer: Trainer | None = None
        self._parallel, self._env = parallel, parallel.env
        self._timeout = parallel.config.timeout_seconds
        # A connection of its own: another's blocking call would hold it.
        store = self._parallel.store
        self._store = store.clone() if store is not None else None
        self._host, self._place = socket.gethostname(), _place()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._words = 0
        self._idle, self._first = 0.0, 0
        self._lock = threading.Lock()
        self._nccl = self._store is not None and self._parallel.device.type == "cuda"

    def follow(self, trainer: Trainer) -> None:
        """Tell of the steps of a trainer from now on."""
        self._trainer, self._first = trainer, trainer.step

    @property
    def _step(self) -> int:
        return 0 if self._trainer is None else self._trainer.step

    def __enter__(self) -> Self:
        """Start to leave word."""
        self._say()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave a last word; explain what a failed collective raised."""
        end, lost = "finished", None
        if error is not None and not isinstance(error, Preempted):
            if self._env.world > 1 and _is_of_a_collective(error):
                lost = self._explain(error)
            elif isinstance(error, Exception):
                text = (str(error).splitlines() or [""])[0]
                self._post(f"{self._me()} failed: {kind.__name__}: {text}")  # type: ignore[union-attr]
            end = "failed"
        self._over.set()
        self._say(end)
        if lost is not None:
            raise RankLost(lost) from error

    # What a rank says of itself.

    def _stands(self) -> tuple[int, str]:
        phase = self._parallel.phase
        return self._step + (phase in _STEP), phase

    def _me(self) -> str:
        step, phase = self._stands()
        return f"rank {self._env.rank} on {self._host} at step {step}, {phase}:"

    def _say(self, end: str = "") -> None:
        step, phase = self._stands()
        self._words += 1
        word = {
            "host": self._host,
            "place": self._place,
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "at": _innermost(sys._current_frames().get(self._main)),
            "idle": round(self._idle),
            "words": self._words,
            "end": end,
        }
        self._ask("set", f"watch-{self._env.rank}", json.dumps(word))

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call the store; None when there is none, or it has gone with its host."""
        if self._store is None:
            return None
        try:
            with self._lock:
                return getattr(self._store, method)(*arguments)
        except RuntimeError:
            return None

    # What the others have said.

    def _others(self) -> dict[int, dict[str, Any]]:
        """Last words of the other ranks."""
        ranks = [rank for rank in range(self._env.world) if rank != self._env.rank]
        keys = [f"watch-{rank}" for rank in ranks]
        if not ranks or not self._ask("check", keys):
            return {}
        found = self._ask("multi_get", keys) or []
        return {rank: json.loads(word) for rank, word in zip(ranks, found, strict=False)}

    def _dead(self, words: dict[int, dict[str, Any]]) -> list[int]:
        """Ranks on this machine whose process is gone without a last word."""
        here = {r: w for r, w in words.items() if w["place"] == self._place and not w["end"]}
        return [rank for rank, word in here.items() if not _alive(word["pid"])]

    def _explain(self, error: BaseException) -> str:
        """What this rank says of a failed collective: who is gone, or where the others stand."""
        posted, begin, before = None, time.monotonic(), self._others()
        words, gone = before, self._dead(before)
        while not gone and posted is None and time.monotonic() - begin < SILENT:
            time.sleep(TICK / 4)
            words, posted = self._others(), self._posted()
            gone = self._dead(words)
        silent = [r for r, w in words.items() if w == before.get(r) and not w["end"]]
        failed = f"{self._me()} {_collective(error)} failed: "
        first = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        if posted is not None and not gone:
            return f"{failed}{posted}. It raised: {first}"
        if gone or silent:
            how = "is gone" if gone else "does not answer"
            told = "; ".join(_told(rank, words[rank], how) for rank in gone or silent)
        elif words:
            told = f"no rank is gone. {self._standing(words)}"
        else:
            told = "the store of the ranks is gone, and the machine of the first of them maybe too"
        self._post(told)
        return f"{failed}{told}. It raised: {first}"

    def _standing(self, words: dict[int, dict[str, Any]]) -> str:
        """Where the ranks stand: those that lag behind this one, or all."""
        mine = self._stands()
        behind = {r: w for r, w in words.items() if (w["step"], w["phase"]) != mine}
        shown = list((behind or words).items())[:4]
        return "; ".join(_told(rank, word) for rank, word in shown)

    def _post(self, text: str) -> None:
        """Tell all ranks why the run ends, unless another has."""
        self._ask("compare_set", "watch-lost", "", text)

    def _posted(self) -> str | None:
        """Why the run ends, if a rank has said so."""
        if not self._ask("check", ["watch-lost"]):
            return None
        text = self._ask("get", "watch-lost")
        return text.decode() if text else None

    # The thread.

    def _run(self) -> None:
        marker, last, trouble, warned = self._marker(), time.monotonic(), 0.0, False
        while not self._over.wait(TICK):
            now = time.monotonic()
            # At most two ticks: a process that was suspended has not been idle meanwhile.
            passed, last = min(now - last, 2 * TICK), now
            moved, marker = marker != self._marker(), self._marker()
            self._idle = 0.0 if moved else self._idle + passed
            self._say()
            why = self._trouble()
            trouble = trouble + passed if why else 0.0
            if why and trouble > GRACE:
                self._leave(f"{self._me()} the run cannot go on: {why}")
            if self._idle <= passed:
                warned = False
            if self._nccl and self._idle > self._timeout - EARLIER and not warned:
                warned = True
                os.write(2, f"geon: {self._idling()}. {self._standing(self._others())}\n".encode())
            if self._idle > self._limit() and sys.gettrace() is None:
                self._leave(self._idling(), stacks=True)

    def _idling(self) -> str:
        return (
            f"{self._me()} nothing has moved for {self._idle:.0f} s (parallel.timeout_seconds "
            f"{self._timeout:g}); it stands {_innermost(sys._current_frames().get(self._main))}"
        )

    def _marker(self) -> tuple[int, int]:
        return self._step, self._parallel.entries

    def _limit(self) -> float:
        early = self._step <= self._first + 1
        long = early or self._parallel.phase not in _STEP
        return (PATIENCE if long else STUCK) * self._timeout

    def _trouble(self) -> str | None:
        """Why this rank waits in vain; None where it does not."""
        if (posted := self._posted()) is not None:
            return posted
        words = self._neighbours()
        dead = self._dead(words)
        if not dead:
            return None
        told = "; ".join(_told(rank, words[rank], "is gone") for rank in dead)
        self._post(told)
        return told

    def _neighbours(self) -> dict[int, dict[str, Any]]:
        """Last words of the other ranks of this machine."""
        first = self._env.rank - self._env.local_rank
        ranks = [r for r in range(first, first + self._env.local_world) if r != self._env.rank]
        keys = [f"watch-{rank}" for rank in ranks]
        if not ranks or not self._ask("check", keys):
            return {}
        found = self._ask("multi_get", keys) or []
        return {rank: json.loads(word) for rank, word in zip(ranks, found, strict=False)}

    def _leave(self, text: str, stacks: bool = False) -> None:
        if self._over.is_set():
            return
        if stacks:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
            self._post(text)
        os.write(2, f"geon: error: {text}\n".encode())
        self._say("failed")
        os._exit(1)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether an error, or one that it came from, was raised by a collective."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, _ERRORS):
            return True
        if isinstance(seen, RuntimeError) and _SAID_BY_TRANSPORTS.search(str(seen)):
            return True
        seen = _behind(seen)
    return False


def _behind(error: BaseException) -> BaseException | None:
    """What an error came from; what was turned into another on purpose is left out."""
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _collective(error: BaseException) -> str:
    """Name of the collective that raised, as far as the traceback tells."""
    seen: BaseException | None = error
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if Path(frame.filename).name in _NAMING and frame.name != "wrapper":
                return frame.name
        seen = _behind(seen)
    return "a collective"


def _told(rank: int, word: dict[str, Any], how: str = "") -> str:
    where = f"rank {rank} on {word['host']}"
    last = f"step {word['step']}, {word['phase']}"
    if how:
        return f"{where} {how} (pid {word['pid']}, last seen at {last})"
    if word["end"]:
        return f"{where} has {word['end']} at {last}"
    return f"{where} stands at {last} for {word['idle']} s, {word['at']}"


def _innermost(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"in {frame.f_code.co_name} ({file}:{frame.f_lineno})"


def _place() -> str:
    """What tells whether a process id means the same process to two ranks."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
