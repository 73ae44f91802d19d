"""Train a language model: `python train.py experiment=first_run`, or under torchrun.

Hydra composes the config, the schema checks it, the engine runs it.
"""

import hashlib
import re
import sys

from geon.launch import signals
from geon.launch.leave import BAD_INPUT, guard, leave

if __name__ == "__main__":  # before the imports below, which take a second and more
    signals.die_with_parent()
    if signals.refused_before():
        leave(BAD_INPUT)
    signals.listen()

# ruff: noqa: E402
import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from geon.configs.check import check_overrides, resolve
from geon.configs.schema import register
from geon.launch.env import read_env


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
        env = read_env()
        from geon.engine.main import execute

        execute(config, env)

    if status := guard(run):
        leave(status)


if __name__ == "__main__":
    register()
    # The deepspeed launcher tells the local rank twice: as an argument, and by LOCAL_RANK.
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    if status := guard(lambda: check_overrides(sys.argv[1:])):
        leave(status)
    main()
    leave(0)
