"""What resting in bf16 does to a momentum, rounded to nearest and by chance, and what it costs.

python -m geon.benches.momenta
python -m geon.benches.momenta --steps 2000 --json docs/results/momenta.json

Averages gradients as a rule does (in fp32, momentum 0.95), beside an fp64 average. The gradients of
`shrinking` are one draw that gets smaller by half in 1,000 steps; those of `noisy` have a new draw
ten times as large added at each step. `off` is the distance from the fp64 average over its length
in the last step, `bias` how much longer than it the average is, along it, in the mean over the last
half. Seconds, the least of some repeats, are of one rounding of a 768 x 3072 momentum, and of its
averaging in fp32.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from geon.benches import results
from geon.engine.metrics import hardware
from geon.launch.leave import guard
from geon.optim.rounding import Box, first_draw, round_by_chance
from geon.optim.shard import Region

MOMENTUM = 0.95
SHAPE, LARGE = (128, 64), (768, 3072)
Rounding = Callable[[Tensor, Tensor, int], None]


def to_nearest(average: Tensor, held: Tensor, step: int) -> None:
    """Round as a cast does."""
    held.copy_(average)


def by_chance(average: Tensor, held: Tensor, step: int) -> None:
    """Round as the optimizer does."""
    rows, cols = held.shape
    draws = first_draw("w", held.device) + step
    round_by_chance([Box(draws, Region((0, rows), (0, cols)), average, held)])


ROUNDINGS: dict[str, Rounding] = {"nearest": to_nearest, "chance": by_chance}


def follow(rounding: Rounding, noise: float, steps: int) -> dict[str, float]:
    """Average gradients for some steps; how far the momentum is from the fp64 average."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SHAPE, generator=generator)
    held, exact = torch.zeros(SHAPE, dtype=torch.bfloat16), torch.zeros(SHAPE, dtype=torch.float64)
    longer = []
    for step in range(steps):
        grad = base * 0.5 ** (step / 1000) + noise * torch.randn(SHAPE, generator=generator)
        average = held.float().lerp_(grad, 1.0 - MOMENTUM)
        rounding(average, held, step)
        exact.lerp_(grad.double(), 1.0 - MOMENTUM)
        if step >= steps // 2:
            longer.append(((held - exact) * exact).sum() / exact.square().sum())
    off = (held - exact).norm() / exact.norm()
    return {"off": off.item(), "bias": torch.stack(longer).mean().item()}


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Least seconds of a piece of work, once it is warm."""
    found = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[3:])


def main() -> None:
    """Print what was found, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    average = torch.randn(LARGE, device=args.device)
    held, other = average.bfloat16(), average.clone()
    work: dict[str, Callable[[], object]] = {
        "average in fp32": lambda: average.lerp_(other, 1.0 - MOMENTUM),
        "nearest": lambda: to_nearest(average, held, 1),
        "chance": lambda: by_chance(average, held, 1),
    }
    found = {
        "averages": {
            f"{name}, {kind}": follow(rounding, noise, args.steps)
            for kind, noise in (("shrinking", 0.0), ("noisy", 10.0))
            for name, rounding in ROUNDINGS.items()
        },
        "seconds": {name: seconds(one, args.device, args.repeats) for name, one in work.items()},
        "meta": {
            "steps": args.steps,
            "torch": torch.__version__,
            "hardware": hardware(args.device),
        },
    }
    if args.json:
        results.write(args.json, found)
    print(results.text_of(found), end="")


if __name__ == "__main__":
    sys.exit(guard(main))
