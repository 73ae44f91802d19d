"""Check a job without starting it: python -m geon.scripts.check_jobs optim=muon --ranks 8.

Config, data, layout and batch, for any number of ranks; needs no GPU and writes nothing.
"""

import argparse
import json
import sys

from geon.configs.choices import Source
from geon.engine.checks import check, check_launched
from geon.errors import UsageError
from geon.launch.arguments import add_config_dir
from geon.launch.compose import compose, with_folder
from geon.launch.leave import guard
from geon.launch.preflight import Start
from geon.scripts.flags import whole


def check_all(jobs: list[Start]) -> None:
    """Check each job, in order.

    Raises:
        UsageError: of the first bad one; says which where there are several.
    """
    told, corpus = None, None
    for job in jobs:
        try:
            config = compose(job.overrides, "train")
            check_launched(config, job.launched)
            text = config.data, config.seed if config.data.source is Source.synthetic else 0
            corpus = check(config, job.ranks, corpus=corpus if text == told else None).corpus
            told = text
        except UsageError as error:
            place = f"job {' '.join(job.overrides)}: " if len(jobs) > 1 else ""
            raise UsageError(f"{place}{error}") from None


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.scripts.check_jobs", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. optim=muon")
    parser.add_argument("--ranks", type=whole(), default=1, help="processes over all nodes")
    parser.add_argument("--jobs", action="store_true", help="read jobs from stdin, as launchers do")
    add_config_dir(parser)
    told = parser.parse_intermixed_args(arguments)

    def act() -> None:
        if told.ranks < 1:
            raise UsageError(f"--ranks must be positive, got {told.ranks}")
        if told.jobs:
            found = [Start(**job) for job in json.load(sys.stdin)]
        else:
            found = [Start(with_folder(told.overrides, told.config_dir), told.ranks)]
        check_all(found)
        print(f"{len(found)} of {len(found)} could start")

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
