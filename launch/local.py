"""One torchrun child on this machine."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The folder of optim/, models/ and the others: of a checkout, or of the installed package."""

_CHECKOUT = (ROOT / "geon").is_dir()

HOME = ROOT if _CHECKOUT else ROOT.parent
"""The folder that `import geon` is found in."""

PROGRAM = (str(ROOT / "train.py"),) if _CHECKOUT else ("-m", "geon.train")
"""What python, or torchrun, is to run to train."""

SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
"""Which signals torchrun passes on to its ranks. Without it SIGUSR1 kills torchrun at once."""


def torchrun_command(
    ranks: int, arguments: Sequence[str], program: Path | str | None = None
) -> list[str]:
    """Command line that starts `ranks` processes of a program on this machine.

    program: a file; None trains.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = PROGRAM if program is None else (str(program),)
    return [*launcher, f"--nproc_per_node={ranks}", SIGNALS, *words, *arguments]


def command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """Command line of a training job: plain python for one rank, torchrun for more."""
    if ranks == 1:
        return [sys.executable, *PROGRAM, *arguments]
    return torchrun_command(ranks, arguments)


def run(
    ranks: int,
    arguments: Sequence[str],
    *,
    threads: int | None = None,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a training job to its end and capture what it printed.

    threads: CPU threads of each rank; None leaves the launcher's choice.
    """
    env = {**os.environ, **(environment or {})}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    return subprocess.run(
        command(ranks, arguments),
        env=env,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
