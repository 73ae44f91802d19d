"""The command line of train.py: Hydra's flags, of which some only print, and some are refused."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from geon.errors import UsageError, shown
from geon.launch.env import under_launcher

_REFUSED = {
    "--config-path": "configs come from this checkout: add a folder of your own by --config-dir",
    "--config-name": "every run starts from configs/train.yaml: choose experiment=NAME",
    "--experimental-rerun": "a pickled job is code: give its overrides again",
    "--hydra-help": "what there is to choose from is listed by --help",
    "--run": "this is what happens without it",
}


@dataclass(frozen=True)
class Arguments:
    """What train.py is asked for.

    Attributes:
        overrides: KEY=VALUE and its kin.
        multirun: whether they make several jobs.
        prints: whether something is to be printed instead (help, configs, completions).
        folder: of the user's own config files.
        helps: whether the help is asked for, which is ours.
        completes: whether a shell asks how a word could go on.
    """

    overrides: list[str]
    multirun: bool = False
    prints: bool = False
    folder: Path | None = None
    helps: bool = False
    completes: bool = False


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Give a launcher the flag for the user's own config files."""
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder of your own config files"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "--help lists what there is"
        if re.search(r"--[\w.]+=", message):
            hint += "; keys have no hyphens: KEY=VALUE (a W&B sweep: ${args_no_hyphens})"
        raise UsageError(f"{shown(message)}; {hint}")


def read_arguments(arguments: Sequence[str]) -> Arguments:
    """Sort the words of a command line.

    Raises:
        UsageError: an unknown flag, one that is not taken, or -m under a launcher.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for flags in (("--help", "-h"), ("--hydra-help",), ("--version",), ("--resolve",)):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--experimental-rerun")
    parser.add_argument("--run", "-r", action="store_true")
    told: Any = parser.parse_intermixed_args(list(arguments))
    for flag, reason in _REFUSED.items():
        if getattr(told, flag.strip("-").replace("-", "_")):
            raise UsageError(f"{flag} is not taken: {reason}")
    prints = told.help or told.version or told.shell_completion
    prints = bool(prints or told.cfg or told.info)
    if not prints and (told.resolve or told.package):
        raise UsageError("--resolve and --package have no effect without --cfg")
    if told.multirun and under_launcher():
        raise UsageError(
            "-m runs jobs one after another in one process, and several ranks would start each of "
            "them twice: run grids by python -m geon.launch.sweep, with cluster.ranks_per_node"
        )
    return Arguments(
        told.overrides, told.multirun, prints, told.config_dir, told.help, told.shell_completion
    )
