"""How long a save holds a run up: python -m geon.benches.checkpoint --json model/size=124m.

A run is prepared as train.py does (other arguments are its overrides), and the checkpoint that it
starts from is saved several times: within the step, and by a thread beside it. The first save in
the background makes the buffers of the copy, and is told apart.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from geon.engine import checkpoint
from geon.engine.checkpointer import Checkpointer, Staging
from geon.engine.main import prepare
from geon.engine.trainer import Trainer
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import guard


def seconds(action: Callable[[], Any]) -> float:
    """Time that an action takes."""
    since = time.perf_counter()
    action()
    return time.perf_counter() - since


class Timed(Staging):
    """Notes how long copies take."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy, and note the time."""
        since = time.perf_counter()
        copies = super().copy(tensors)
        self.seconds.append(time.perf_counter() - since)
        return copies


def measure(trainer: Trainer, saves: int) -> dict[str, Any]:
    """Save both ways; medians, in seconds."""
    within = Checkpointer(0, 1)
    within.save(trainer)  # the first one also loads what torch loads when first asked
    sync = [seconds(lambda: within.save(trainer)) for _ in range(saves)]
    beside = Checkpointer(0, 1, background=True)
    beside._staging = staging = Timed()
    stalls, writes = [], []
    for _ in range(saves + 1):
        stalls.append(seconds(lambda: beside.save(trainer)))
        writes.append(seconds(beside.wait))
    held = checkpoint.tensors(*trainer.run.tensors()).values()
    rest = [stall - copy for stall, copy in zip(stalls, staging.seconds, strict=True)]
    found = checkpoint.find(trainer.folder)
    assert found is not None
    return {
        "device": str(trainer.run.parallel.device),
        "bytes": sum(t.numel() * t.element_size() for t in held),
        "saves": saves,
        "within_the_step": statistics.median(sync),
        "background_first_copy": staging.seconds[0],
        "background_copy": statistics.median(staging.seconds[1:]),
        "background_stall_besides_the_copy": statistics.median(rest[1:]),
        "background_largest_stall_besides_the_copy": max(rest),
        "background_write": statistics.median(writes[1:]),
        "verify": seconds(lambda: checkpoint.newest_sound(found, fall_back=False)),
    }


def run(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=3, help="saves of each kind that are timed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one if not given")
    args, overrides = parser.parse_known_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        given = ["parallel=single", "data=synthetic", *overrides, f"output={folder}"]
        config = compose([*given, "checkpoint.resume=never"])
        trainer, _ = prepare(config, Env(), [])
        found = measure(trainer, args.saves)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{key:44} {value}" for key, value in found.items()))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
