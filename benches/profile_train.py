"""Profile training steps, and the optimizer's alone: a trace, and a table of what costs most.

python -m geon.benches.profile_train parallel=single data=synthetic --trace trace.json --rows 25

Takes the overrides of train.py. The trace is for chrome://tracing or ui.perfetto.dev; that of the
optimizer goes beside it, as trace.optimizer.json. Times are self times, of one step: of kernels on
a GPU, of operators on a CPU. On a GPU a second table has the operators, by the host's time in them.
The profiler slows the host down: compare shares, and take seconds from benches.train.

The file is not named profile.py: beside another script that would hide Python's own module, which
torch imports.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from geon.benches.count_operators import is_kernel
from geon.benches.loop import wait, watched
from geon.benches.solver import check_output
from geon.errors import UsageError
from geon.launch.leave import guard, leave
from geon.scripts.flags import whole

WARM = 3
Row = dict[str, Any]


def profiled(call: Callable[[], None], steps: int, device: torch.device) -> Any:
    """Profile of some calls, the device waited for."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    wait(device)
    with profile(activities=activities) as found:
        for _ in range(steps):
            call()
        wait(device)
    return found


def rows(averages: Sequence[Any], steps: int, kernels: bool) -> list[Row]:
    """What costs most first: kernels by their time on the device, or operators by the host's.

    averages: `key_averages()` of a profile; ranges that somebody named are left out.

    Returns: name, calls, milliseconds and share of the sum, of one step.
    """
    found = []
    for one in averages:
        if one.is_user_annotation or is_kernel(one) != kernels:
            continue
        if not kernels and one.device_type != torch.autograd.DeviceType.CPU:
            continue  # a copy on the device
        spent = one.self_device_time_total if kernels else one.self_cpu_time_total
        found.append(
            {"name": one.key, "calls": one.count / steps, "milliseconds": spent / 1e3 / steps}
        )
    total = sum(row["milliseconds"] for row in found)
    for row in found:
        row["share"] = row["milliseconds"] / total if total else 0.0
    return sorted(found, key=lambda row: -row["milliseconds"])


def table(found: Sequence[Row], title: str, most: int) -> str:
    """The first rows, and their sum."""
    total, calls = (sum(row[key] for row in found) for key in ("milliseconds", "calls"))
    lines = [f"{title}: {total:.2f} ms in {calls:,.0f} calls a step"]
    for row in found[:most]:
        spent = f"{row['milliseconds']:9.3f} ms {row['share']:6.1%}"
        lines.append(f"  {spent} {row['calls']:8.1f}  {row['name'][:90]}")
    return "\n".join(lines)


def report(found: Any, what: str, told: argparse.Namespace, device: torch.device) -> None:
    """Print the tables of a profile."""
    averages = found.key_averages()
    if device.type == "cuda":
        print(table(rows(averages, told.steps, True), f"{what}, kernels", told.rows))
        what += ", host"
    print(table(rows(averages, told.steps, False), f"{what}, operators", told.rows), flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.benches.profile_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="of train.py")
    add("--steps", type=whole(), default=3, help="that are profiled (%(default)s)")
    add("--rows", type=whole(), default=25, help="of each table (%(default)s)")
    add("--trace", type=Path, metavar="FILE", help="write the traces there (main rank)")
    told = parser.parse_intermixed_args(arguments)
    for option in ("steps", "rows"):
        if getattr(told, option) < 1:
            raise UsageError(f"--{option} must be at least 1, got {getattr(told, option)}")
    check_output(told.trace, "--trace")
    one = watched(told.overrides)
    parallel, optimizer = one.trainer.run.parallel, one.trainer.run.optimizer
    if parallel.backend is not None:
        raise UsageError("parallel=deepspeed steps its optimizer itself: choose another layout")
    for _ in range(WARM):
        one.step()
    traced = profiled(one.step, told.steps, parallel.device)
    one.gradients()
    optimizer.step()
    alone = profiled(optimizer.step, told.steps, parallel.device)
    if not parallel.env.main:
        return 0
    report(traced, "training step", told, parallel.device)
    report(alone, "optimizer step", told, parallel.device)
    if told.trace:
        traced.export_chrome_trace(str(told.trace))
        alone.export_chrome_trace(str(told.trace.with_suffix(".optimizer.json")))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; bad input is one message and status 2."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    leave(main())
