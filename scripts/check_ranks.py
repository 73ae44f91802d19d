"""Compare all ranks before they train: `torchrun ... -m geon.scripts.check_ranks`.

Versions, devices and clocks of every rank, the time of a sum over all ranks and over each pair of
neighbours, in one table. The exit status is 2 where a rank differs from the others, and names it;
torchrun makes 1 of it. `python -m geon.launch.slurm --preflight` runs it before a job trains.
"""

import argparse
import platform
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from geon import __version__
from geon.engine.devices import rank_device
from geon.launch.env import read_env
from geon.launch.leave import BAD_INPUT, guard, leave
from geon.scripts.doctor import version

ALIKE = ("geon", "torch", "cuda", "nccl", "python", "hydra-core", "numpy", "device")
"""Facts that must be equal on all ranks."""
CLOCK_SECONDS = 1.0
"""Most that a rank's clock may be off the middle one; the log and file times would not agree."""
MEBIBYTES = 16
_ROUNDS = 5
_SECONDS = 60.0
"""Until a rank that does not answer ends the check."""


def facts(device: torch.device) -> dict[str, Any]:
    """What one rank is."""
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "geon": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else "-",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "-",
        "python": platform.python_version(),
        "hydra-core": version("hydra-core"),
        "numpy": version("numpy"),
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {platform.machine()}",
    }


def gather(own: Any) -> list[Any]:
    """One object of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def sum_seconds(device: torch.device, group: Any = None, ranks: int = 0) -> float:
    """Seconds of a sum of 16 MiB over a group, at best.

    Raises:
        RuntimeError: it is wrong.
    """
    ranks = ranks or dist.get_world_size()
    best = float("inf")
    for _ in range(_ROUNDS):
        box = torch.ones(MEBIBYTES << 18, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        dist.all_reduce(box, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
        if not bool((box == ranks).all()):
            raise RuntimeError(f"a sum over {ranks} ranks is wrong")
    return best


def link_seconds(device: torch.device) -> float | None:
    """Seconds of a sum over this rank and the next; None on the last rank.

    First all pairs that begin at an even rank, at the same time, then the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = None
    for first in (0, 1):
        for low in range(first, world - 1, 2):
            group = dist.new_group([low, low + 1])
            if rank in (low, low + 1):
                mine = group
        if any(rank in (low, low + 1) for low in range(first, world - 1, 2)):
            seconds = sum_seconds(device, mine, 2)
            if rank % 2 == first:
                found = seconds
        dist.barrier()
    return found


def compare(ranks: Sequence[dict[str, Any]], clocks: Sequence[float]) -> list[str]:
    """What is wrong: a line for each rank that differs from most others, by fact."""
    lines = []
    for fact in ALIKE:
        ((usual, _),) = Counter(str(one[fact]) for one in ranks).most_common(1)
        lines += [
            f"rank {i} ({one['host']}): {fact} is {one[fact]}, on most others {usual}"
            for i, one in enumerate(ranks)
            if str(one[fact]) != usual
        ]
    middle = sorted(clocks)[len(clocks) // 2]
    lines += [
        f"rank {i} ({ranks[i]['host']}): its clock is {clock - middle:+.1f} s off"
        for i, clock in enumerate(clocks)
        if abs(clock - middle) > CLOCK_SECONDS
    ]
    return lines


def table(
    ranks: Sequence[dict[str, Any]], clocks: Sequence[float], links: Sequence[float | None]
) -> str:
    """A line for each rank. The last column is the sum over it and the next one."""
    middle = sorted(clocks)[len(clocks) // 2]
    head = ("rank", "host", "device", "torch", "cuda", "nccl", "python", "clock, s", "to the next")
    rows = [head]
    for i, (one, clock, link) in enumerate(zip(ranks, clocks, links, strict=True)):
        rate = ""
        if link is not None:
            rate = f"{1e3 * link:.2f} ms, {MEBIBYTES / 1024 / link:.2f} GiB/s"
        rows.append((str(i), one["host"], one["device"], one["torch"], str(one["cuda"]),
                     one["nccl"], one["python"], f"{clock - middle:+.2f}", rate))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(f"{w:<{n}}" for w, n in zip(row, widths, strict=True)).rstrip()
                     for row in rows)  # fmt: skip


def check(device: torch.device) -> int:
    """Compare the ranks of the process group, and print the table; returns the exit status."""
    ranks = gather(facts(device))
    dist.barrier()
    clocks = gather(time.time())
    wrong = compare(ranks, clocks)
    if wrong:  # ranks of other versions may not understand each other's collectives
        links: list[float | None] = [None] * len(ranks)
    else:
        links = gather(link_seconds(device))
        whole = max(gather(sum_seconds(device)))
    if dist.get_rank() == 0:
        print(table(ranks, clocks, links))
        if not wrong:
            rate = f"{1e3 * whole:.2f} ms"
            print(f"a sum of {MEBIBYTES} MiB over {len(ranks)} ranks: {rate}", flush=True)
        for line in wrong:
            print(f"geon: error: {line}", file=sys.stderr, flush=True)
    return BAD_INPUT if wrong else 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.scripts.check_ranks", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    told = parser.parse_args(arguments)

    def act() -> int:
        env = read_env()
        if not env.launched:
            parser.error("start it by torchrun, as what is to be trained")
        device = rank_device(told.device, env)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=_SECONDS)
        )
        return check(device)

    return guard(act)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
