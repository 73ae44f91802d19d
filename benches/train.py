"""Time training as train.py does it: tokens a second, where a step goes, what the loop adds.

python -m geon.benches.train parallel=single data=synthetic --steps 20 --json out.json
torchrun --standalone --nproc_per_node=2 -m geon.benches.train parallel=fsdp --steps 20

Takes the overrides of train.py, builds the run through the engine and steps its trainer; nothing is
written but the result. Evaluation, checkpoints and log lines are left out. Seconds are medians of a
step on the main rank; on a GPU they are read from events in the stream, and nothing waits:

- forward, backward: of all micro-batches; FSDP2's and DDP's collectives are in them.
- optimizer: clipping, the step, clearing gradients; without
- exchange: what of it waits for the optimizer's own collectives.
- data: all the rest: reading windows, bringing them to the device, the loop itself.

overhead_share is what a step of the trainer takes over a plain loop around the bare model, minus
one: forward and backward on the tokens of that step, and `optimizer.step()` on the gradients. Both
are timed in turn, the device waited for; null on several ranks. seconds_to_first_step begins after
the imports. peak_memory_bytes is what torch allocated on a GPU, what the process held on a CPU; of
the rank with most.
"""

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from geon.benches import results
from geon.benches.loop import PHASES, seconds, wait, watched
from geon.benches.solver import check_output, meta
from geon.configs.schema import Layouts
from geon.engine.metrics import peak_flops
from geon.errors import UsageError
from geon.launch.leave import guard, leave
from geon.scripts.flags import whole


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated by torch on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(told: argparse.Namespace) -> dict[str, Any] | None:
    """Measure as told; the result on the main rank, None on the others."""
    begin = time.perf_counter()
    one = watched(told.overrides)
    run = one.trainer.run
    device, world = run.parallel.device, run.parallel.env.world
    one.step()
    wait(device)
    first = time.perf_counter() - begin
    for _ in range(told.warmup):
        one.step()
    steps = one.phases(told.steps)
    peak = max(run.parallel.gather(peak_memory(device)))
    overhead = None
    if world == 1 and run.config.parallel.layout is not Layouts.deepspeed:
        seconds(one.plain, device)  # its first call may compile
        overhead = one.overhead(told.rounds)
    if not run.parallel.env.main:
        return None
    tokens = run.config.data.batch_tokens
    rate = tokens / median(sum(step.values()) for step in steps)
    track3 = _track3(told.track3, tokens)
    most = peak_flops(device)
    return {
        "tokens_per_second": rate,
        "track3_tokens_per_second": track3,
        "tokens_per_second_over_track3": rate / track3 if track3 else None,
        "mfu": rate * run.model.flops_per_token() / (most * world) if most else None,
        "peak_memory_bytes": peak,
        "seconds": {phase: median(step[phase] for step in steps) for phase in PHASES},
        "overhead_share": overhead,
        "seconds_to_first_step": first,
        "meta": meta(device.type, "train", told.words),
    }


def _track3(text: str | None, tokens: int) -> float | None:
    """Tokens a second; of "1.165s", which are the seconds of a step of as many tokens.

    Raises:
        UsageError: not a number above 0.
    """
    if text is None:
        return None
    number = re.fullmatch(r"(\d+\.?\d*|\.\d+)(s?)", text)
    if number is None or not float(number[1]):
        raise UsageError(
            f"--track3 '{text}' is neither tokens a second nor seconds: 450000, 1.165s"
        )
    return tokens / float(number[1]) if number[2] else float(number[1])


def _say(found: dict[str, Any]) -> None:
    spent = found["seconds"]
    total = sum(spent.values())
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    print(f"{found['tokens_per_second']:,.0f} tokens/s{mfu}, {1e3 * total:.1f} ms a step")
    for phase, one in spent.items():
        print(f"  {phase:<10} {1e3 * one:9.2f} ms {one / total:6.1%}")
    if found["overhead_share"] is not None:
        print(f"  over the plain loop {found['overhead_share']:+.1%}")
    if found["track3_tokens_per_second"]:
        print(f"  over track 3 {found['tokens_per_second_over_track3']:.3f}")
    print(
        f"  peak memory {found['peak_memory_bytes'] / 2**30:.2f} GiB, first step after "
        f"{found['seconds_to_first_step']:.1f} s",
        flush=True,
    )


def write(path: Path, found: dict[str, Any], label: str | None) -> None:
    """Write a result; with a label under "arms", beside those of other labels."""
    before = json.loads(path.read_text()) if path.exists() else {}
    arms = before.get("arms", {})
    if label is not None:
        found = {**before, "arms": {**arms, label: found}}
    elif arms:
        found = {**found, "arms": arms}
    results.write(path, found)


def run(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.benches.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="of train.py")
    add("--steps", type=whole(), default=10, help="that are measured (%(default)s)")
    add(
        "--warmup",
        type=whole(0),
        default=3,
        help="steps before them, besides the first (%(default)s)",
    )
    add("--rounds", type=whole(), default=5, help="pairs of step and plain loop (%(default)s)")
    add(
        "--track3", metavar="TOKENS_PER_SECOND", help="of the speedrun's trainer; 1.165s: of a step"
    )
    add("--json", type=Path, metavar="FILE", help="write the result there")
    add("--label", help="key of the result among the arms of the file, which keeps the others")
    told = parser.parse_intermixed_args(arguments)
    told.words = sys.argv[1:] if arguments is None else list(arguments)
    for option, least in (("steps", 1), ("warmup", 0), ("rounds", 1)):
        if getattr(told, option) < least:
            raise UsageError(f"--{option} must be at least {least}, got {getattr(told, option)}")
    if told.label and not told.json:
        raise UsageError("--label goes with --json")
    _track3(told.track3, 1)
    check_output(told.json)
    found = measure(told)
    if found is not None:
        _say(found)
        if told.json:
            write(told.json, found, told.label)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; bad input is one message and status 2."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    leave(main())
