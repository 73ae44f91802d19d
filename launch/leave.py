"""How a command ends: one message for bad input, and no teardown that can hang."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from geon.errors import OutOfMemory, UsageError
from geon.launch.env import under_launcher, wants_traceback


def guard(action: Callable[[], int | None]) -> int:
    """Run a command line; returns its exit status.

    Bad input is one message and 2, too little memory one and 1, Ctrl-C is 130. Other errors pass,
    except under a launcher, where they are printed and give 1, because ranks must leave by `leave`.
    """
    try:
        return action() or 0
    except (UsageError, OutOfMemory) as error:
        if wants_traceback():
            traceback.print_exc()
        print(f"geon: error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except Exception:
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
