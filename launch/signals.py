"""Signals that ask a run to stop, and what ties a rank to the launcher that started it.

`listen` is called before anything heavy is imported. Until training begins a signal ends the
process at once: nothing can be lost. From then on it only sets a flag, which engine/preemption.py
reads at every step.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

PREEMPTED = 75
"""Exit status of a run that was asked to stop, saved, and goes on when it is started again."""

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
_AGAIN_SECONDS = 1.0
"""A launcher may pass on the Ctrl-C that the terminal has sent already: that is not a second."""


class _State:
    caught = ""
    since = 0.0
    training = False


def listen() -> None:
    """Take SIGTERM, SIGUSR1 and SIGINT as requests to save and stop."""
    for name in _SIGNALS:
        if (number := getattr(signal, name, None)) is not None:  # Windows lacks SIGUSR1
            signal.signal(number, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    name, now = signal.Signals(number).name, time.monotonic()
    if not _State.training:
        _say(f"geon: {name} before training: nothing to save")
        os._exit(130 if number == signal.SIGINT else PREEMPTED)
    if number == signal.SIGINT and _State.caught:
        if now - _State.since > _AGAIN_SECONDS:
            _say("geon: Ctrl-C again: nothing saved")
            os._exit(130)
        return
    if not _State.caught:
        _State.caught, _State.since = name, now
        if number == signal.SIGINT and os.isatty(2):
            _say("geon: Ctrl-C: saving after this step; again to leave at once")


def _say(text: str) -> None:
    # print() may be what the signal interrupted.
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def caught() -> str:
    """Name of the signal that came since training began; empty without one."""
    return _State.caught


def training(under_way: bool) -> None:
    """Say that training begins, so that signals wait for the end of a step, or that it is over."""
    _State.training = under_way
    _State.caught = ""


def die_with_parent() -> None:
    """Let the system kill this rank when its launcher ends, however that ends (Linux).

    A rank that outlives its launcher would write into the run folder of its successor.
    """
    if "RANK" not in os.environ or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _marker() -> Path | None:
    """File in the private folder that torchrun has made for this job; None under no torchrun."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(told).parents[2] / "geon-bad-input" if told else None


def remember_bad_input() -> None:
    """Leave word for the next attempt, should torchrun start this job again."""
    if (file := _marker()) is not None:
        with contextlib.suppress(OSError):
            file.touch()


def refused_before() -> bool:
    """Whether an earlier attempt of this job has found its input to be bad: it still is."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    file = _marker()
    return again and file is not None and file.exists()
