"""How a command ends: one message for bad input, and no teardown that can hang."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from geon.errors import OutOfMemory, Preempted, RankLost, SaveError, UsageError
from geon.launch import signals
from geon.launch.env import under_launcher, wants_traceback
from geon.launch.extras import missing

BAD_INPUT = 2
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a full or read-only disk, which name the file: no fault of the program."""


def guard(action: Callable[[], int | None]) -> int:
    """Run a command line; returns its exit status.

    Bad input is one message and 2, and so is a package that is not installed; too little memory or
    disk, bad numbers, a lost rank: one and 1. A run that was asked to stop, and has saved, is one
    line and 75; Ctrl-C elsewhere is 130. Others pass, except under a launcher, where they are
    printed and give 1, because ranks must leave by `leave`.
    """
    try:
        return action() or 0
    except (UsageError, OutOfMemory, SaveError, RankLost, FloatingPointError) as error:
        if wants_traceback():
            traceback.print_exc()
        print(f"geon: error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, UsageError):
            return 1
        signals.remember_bad_input()
        return BAD_INPUT
    except Preempted as told:
        if str(told):
            print(f"geon: {told}", file=sys.stderr, flush=True)
        return signals.PREEMPTED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (told := missing(error)) and not wants_traceback():
            print(f"geon: error: {told}", file=sys.stderr, flush=True)
            return BAD_INPUT
        if isinstance(error, OSError) and error.errno in _DISK and not wants_traceback():
            print(f"geon: error: {error}", file=sys.stderr, flush=True)
            return 1
        if not under_launcher():
            raise
        traceback.print_exc()
        return 1


def leave(status: int) -> NoReturn:
    """Exit now. Under a launcher, without tearing the interpreter down.

    A process group's threads drop their last Python objects when they please. One that does so
    while the group or the interpreter is being destroyed waits for a lock that the destroyer
    holds, or aborts. All files are closed by now, so nothing is lost by not tidying up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if under_launcher():
        os._exit(status)
    sys.exit(status)
