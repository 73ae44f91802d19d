"""One run or several in this process, composed before torch is there."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from geon.errors import UsageError
from geon.launch.compose import compose, jobs
from geon.launch.env import agent_run
from geon.launch.trials import Sweep

if TYPE_CHECKING:
    from geon.configs.schema import Config

    Check = Callable[[Config], object]
    Execute = Callable[[Config, Sequence[str]], float | None]


def single(words: Sequence[str], engine: "Callable[[], tuple[Check, Execute]]") -> float | None:
    """Compose one run and do it.

    engine: imports torch, and gives the check of a config and what does it (with its words).

    Returns:
        The run's objective (eval.objective), on every rank; None of other modes.
    """
    config = compose(words, "train")
    if agent := agent_run():  # of one sweep's runs, none is to find another's folder
        words = [*words, f"name='{config.name}-{agent}'"]
        config = compose(words, "train")
    return engine()[1](config, words)


def multirun(words: Sequence[str], engine: "Callable[[], tuple[Check, Execute]]") -> None:
    """Compose and check all jobs of a grid, then do them; or let a sweeper choose one by one."""
    sweep = Sweep(words)

    def named(own: Sequence[str], point: str) -> tuple["Config", list[str]]:
        name = compose(own, "train").name
        words = [*own, f"name='{name}-{point}'"]
        return compose(words, "train"), words

    if not sweep.plugin:
        todo = [named(own, point) for point, own in jobs(sweep.words)]
        check, execute = engine()
        for config, _ in todo:  # a bad job is found before the first has run
            check(config)
        for config, own in todo:
            execute(config, own)
        return
    first, _ = named(sweep.first(), "first")
    check, execute = engine()
    check(first)

    def trial(own: list[str], point: str) -> float:
        found = execute(*named(own, point))
        if found is None:
            raise UsageError(f"mode={first.mode.value} has no objective for a sweeper to minimise")
        return found

    sweep.run(trial)
