"""Train a language model: `python train.py experiment=first_run`, or under torchrun.

Hydra composes the config, the schema checks it, the engine runs it.
"""

import sys

from geon.launch import signals
from geon.launch.leave import BAD_INPUT, guard, leave

if __name__ == "__main__":  # before the imports below, which take a second and more
    signals.die_with_parent()
    if signals.refused_before():
        leave(BAD_INPUT)
    signals.listen()

# ruff: noqa: E402
from typing import Any

import hydra

from geon.configs.schema import register
from geon.launch.arguments import Arguments, read_arguments
from geon.launch.compose import as_read, compose, with_folder
from geon.launch.env import read_env
from geon.launch.runs import multirun, single


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def printed(_: object) -> None:
    """Stand for the program where Hydra prints help or a config."""


def run(told: Arguments) -> float | None:
    """Do what is asked for; returns the objective of a single run (eval.objective)."""
    env = read_env()

    def engine() -> Any:
        from geon.engine.checks import check
        from geon.engine.main import execute

        return (
            lambda config: check(config, config.plan.world_size or env.world),
            lambda config, words: execute(config, env, words),
        )

    words = with_folder(told.overrides, told.folder)
    return multirun(words, engine) if told.multirun else single(words, engine)


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    # The deepspeed launcher tells the local rank twice: as an argument, and by LOCAL_RANK.
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    by_hydra: list[str] = []

    def act() -> None:
        told = read_arguments(arguments)
        if told.helps:
            from geon.configs.help import page

            print(page(compose(told.overrides, folder=told.folder), told.overrides, told.folder))
        elif told.prints:
            if not told.completes:  # a line that is being typed need not be right
                compose(told.overrides, folder=told.folder)
            by_hydra.extend(told.overrides)
            by_hydra.append("")
        else:
            run(told)

    status = guard(act)
    if by_hydra and not status:
        register()
        sys.argv[1:] = [as_read(a) if a in by_hydra else a for a in arguments]
        printed()
    return status


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
