"""Train a language model: `python train.py experiment=first_run`, or under torchrun.

Hydra composes the config, the schema checks it, the engine runs it.
"""

import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from geon.configs.check import check_overrides, resolve
from geon.configs.schema import register
from geon.errors import UsageError
from geon.launch.env import read_env, wants_traceback


def refuse_cleanly(action: Callable[[], None]) -> None:
    """Turn bad input into one message and exit status 2, on whichever rank."""
    try:
        action()
    except UsageError as error:
        if wants_traceback():
            raise
        print(f"geon: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """Run one job."""

    def run() -> None:
        config = resolve(composed)
        job = HydraConfig.get()
        if job.mode is RunMode.MULTIRUN:
            told = re.sub(r"[^A-Za-z0-9._=,+-]", "-", job.job.override_dirname)
            config.name = f"{config.name}-{told}"[:128]
        from geon.engine.main import execute

        execute(config, read_env())

    refuse_cleanly(run)


if __name__ == "__main__":
    register()
    refuse_cleanly(lambda: check_overrides(sys.argv[1:]))
    main()
    if read_env().launched:
        # Everything is written and closed. A process group's threads may still hold Python
        # objects, and one that lets go while the interpreter shuts down aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
