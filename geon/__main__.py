"""The command `geon`, and `python -m geon`: train, or run a command by its name.

`geon optim=muon` takes what train.py takes. `geon sweep sweep=lr` is
`python -m geon.launch.sweep sweep=lr`, and so on for the names in COMMANDS.
"""

import runpy
import sys

from geon.errors import UsageError, nearest, shown
from geon.launch.leave import guard

COMMANDS = {
    "train": "geon.train",
    "sweep": "geon.launch.sweep",
    "slurm": "geon.launch.slurm",
    "doctor": "geon.scripts.doctor",
    "check": "geon.scripts.check_jobs",
    "prepare": "geon.scripts.prepare_data",
    "generate": "geon.scripts.generate",
    "evaluate": "geon.scripts.evaluate",
    "export": "geon.scripts.export_hf",
    "merge": "geon.scripts.merge",
    "certify": "geon.scripts.certify",
    "plot": "geon.scripts.plot",
    "card": "geon.scripts.card",
    "race": "geon.scripts.race",
}
"""Word -> the module whose command line it is. Everything else is for geon.train."""


def module_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Module that a command line is for, and the words left for it.

    Raises:
        UsageError: the first word is no command, no flag and no override.
    """
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return COMMANDS[first], arguments[1:]
    if first.replace("_", "").replace("-", "").isalpha() and not first.startswith("-"):
        raise UsageError(
            f"geon: no command '{shown(first)}'.{nearest(first, list(COMMANDS))} Commands are "
            f"{', '.join(COMMANDS)}; overrides are KEY=VALUE"
        )
    return COMMANDS["train"], arguments


def main() -> int:
    """Command line; returns the exit status where the command itself does not leave."""
    found: list[tuple[str, list[str]]] = []
    if status := guard(lambda: found.append(module_of(sys.argv[1:]))):
        return status
    ((module, rest),) = found
    sys.argv[1:] = rest
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
