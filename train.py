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
import hydra

from geon.configs.schema import register
from geon.launch.arguments import Arguments, read_arguments
from geon.launch.compose import as_read, compose, jobs
from geon.launch.env import read_env


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def printed(_: object) -> None:
    """Stand for the program where Hydra prints help or a config."""


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


def main(arguments: list[str]) -> int:
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
        register()
        sys.argv[1:] = [as_read(a) if a in told.overrides else a for a in arguments]
        printed()
    return status


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
