"""Train a language model: `python -m geon.train experiment=first_run`, or `torchrun -m geon.train`.

Hydra composes the config, the schema checks it, the engine runs it. `train.py` of a checkout and
the command `geon` are the same program.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from geon.launch import signals
from geon.launch.arguments import Arguments, read_arguments
from geon.launch.compose import as_read, compose, jobs
from geon.launch.env import read_env
from geon.launch.leave import BAD_INPUT, guard, leave


def run(told: Arguments) -> None:
    """Compose and check everything that is asked for, then run it."""
    if not told.multirun:
        configs = [compose(told.overrides, "train", told.folder)]
    else:
        configs = []
        for point, overrides in jobs(told.overrides, told.folder):
            configs.append(compose(overrides, "train", told.folder))
            configs[-1].name = compose([*overrides, f"name='{configs[-1].name}-{point}'"]).name
    env = read_env()
    from geon.engine.checks import check
    from geon.engine.main import execute

    if told.multirun:  # a bad job is found before the first has run
        for config in configs:
            check(config, config.plan.world_size or env.world)
    for config in configs:
        execute(config, env)


def show(told: Arguments, arguments: Sequence[str]) -> None:
    """Let Hydra print what is asked for: help, a config, completions."""
    import hydra

    from geon.configs.overrides import ROOT
    from geon.configs.schema import register

    def train(_: object) -> None:
        """Stand for the program."""

    register()
    sys.argv[1:] = [as_read(a) if a in told.overrides else a for a in arguments]
    hydra.main(version_base="1.3", config_path=str(ROOT), config_name="train")(train)()


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    # The deepspeed launcher tells the local rank twice: as an argument, and by LOCAL_RANK.
    arguments = [a for a in arguments if not a.startswith("--local_rank")]
    told = None

    def act() -> None:
        nonlocal told
        told = read_arguments(arguments)
        if told.prints:
            compose(told.overrides, folder=told.folder)
        else:
            run(told)

    status = guard(act)
    if told is not None and told.prints and not status:
        show(told, arguments)
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
