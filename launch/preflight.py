"""Everything that can be known of jobs before they are started, asked of a child process.

A launcher imports the standard library only; the child imports torch, and needs no device.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from geon.errors import UsageError
from geon.launch.local import HOME


@dataclass(frozen=True)
class Start:
    """A job that will be started.

    Attributes:
        overrides: what train.py is given.
        ranks: processes, over all nodes.
        launched: whether torchrun starts them.
    """

    overrides: Sequence[str]
    ranks: int = 1
    launched: bool = True


def check_jobs(jobs: Sequence[Start]) -> None:
    """Check jobs before the first is started; 4 seconds, and 0.3 for each.

    Raises:
        UsageError: what the first bad one would end with.
    """
    if not jobs:
        return
    # The parent may itself be a rank: its rendezvous is not the child's.
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), own.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "geon.scripts.check_jobs", "--jobs"],
        input=json.dumps([asdict(job) for job in jobs]),
        env=own,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("geon: error: ")]
        if not told:
            raise RuntimeError(f"checking the jobs failed:\n{done.stderr}")
        raise UsageError(told[-1].removeprefix("geon: error: "))
