"""Train a language model: `python -m geon.train experiment=first_run`, or `torchrun -m geon.train`.

Hydra composes the config, the schema checks it, the engine runs it. `train.py` of a checkout and
the command `geon` are the same program.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from geon.launch import signals
from geon.launch.arguments import Arguments, read_arguments
from geon.launch.compose import as_read, compose, with_folder
from geon.launch.env import read_env
from geon.launch.leave import BAD_INPUT, guard, leave
from geon.launch.runs import multirun, single


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


def show(overrides: Sequence[str], arguments: Sequence[str]) -> None:
    """Let Hydra print what is asked for: a config, completions."""
    import hydra

    from geon.configs.overrides import ROOT
    from geon.configs.schema import register

    def train(_: object) -> None:
        """Stand for the program."""

    register()
    sys.argv[1:] = [as_read(a) if a in overrides else a for a in arguments]
    hydra.main(version_base="1.3", config_path=str(ROOT), config_name="train")(train)()


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    # The deepspeed launcher tells the local rank twice: as an argument, and by LOCAL_RANK.
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    by_hydra: list[str] | None = None

    def act() -> None:
        nonlocal by_hydra
        told = read_arguments(arguments)
        if told.helps:
            from geon.configs.help import page

            print(page(compose(told.overrides, folder=told.folder), told.overrides, told.folder))
        elif told.prints:
            if not told.completes:  # a line that is being typed need not be right
                compose(told.overrides, folder=told.folder)
            by_hydra = list(told.overrides)
        else:
            run(told)

    status = guard(act)
    if by_hydra is not None and not status:
        show(by_hydra, arguments)
    return status


def start(arguments: Sequence[str]) -> NoReturn:
    """Be the program: take signals before anything heavy is imported, run, and leave."""
    signals.die_with_parent()
    if signals.refused_before():
        leave(BAD_INPUT)
    signals.listen()
    leave(main(arguments))


if __name__ == "__main__":
    start(sys.argv[1:])
