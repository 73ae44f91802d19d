"""Train a language model: `python train.py experiment=first_run`, or under torchrun.

Hydra composes the config, the schema checks it, the engine runs it.
"""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from geon.configs.check import check_overrides, resolve
from geon.configs.schema import register
from geon.errors import UsageError
from geon.launch.env import read_env, wants_traceback


def leave(status: int) -> NoReturn:
    """Exit now. Under a launcher, without tearing the interpreter down.

    A process group's threads drop their last Python objects when they please. One that does so
    while the group or the interpreter is being destroyed waits for a lock that the destroyer
    holds, or aborts. All files are closed by now, so nothing is lost by not tidying up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if read_env().launched:
        os._exit(status)
    sys.exit(status)


def guarded(action: Callable[[], None]) -> None:
    """Run; turn bad input into one message and exit status 2, on whichever rank."""
    try:
        action()
    except UsageError as error:
        if wants_traceback():
            traceback.print_exc()
        print(f"geon: error: {error}", file=sys.stderr)
        leave(2)
    except Exception:
        if not read_env().launched:
            raise
        traceback.print_exc()
        leave(1)


def job_name(name: str, overrides: str) -> str:
    """Run name of one job of a multirun: told apart by its overrides, cut but still unique."""
    told = re.sub(r"[^A-Za-z0-9._=,+-]", "-", overrides)
    if len(told) > 60:
        told = f"{told[:50]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return f"{name[:60]}-{told}"


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """Run one job."""

    def run() -> None:
        config = resolve(composed)
        job = HydraConfig.get()
        if job.mode is RunMode.MULTIRUN:
            config.name = job_name(config.name, job.job.override_dirname)
        from geon.engine.main import execute

        execute(config, read_env())

    guarded(run)


if __name__ == "__main__":
    register()
    guarded(lambda: check_overrides(sys.argv[1:]))
    main()
    leave(0)
