"""Time a whole optimizer step of Manifold Muon over one of Muon, on the hidden matrices of a GPT.

python -m geon.benches.step --layers 2 --width 256
python -m geon.benches.step --drift 10000 --angle 0.03
python -m geon.benches.step --device cuda --shapes --repeats 12 --dion PATH --json out.json

The step is `HybridOptimizer.step()` in one process: momentum, direction, retraction and write, with
random gradients; at full size about 4 GB and minutes on two cores. --drift tells instead how far a
256 x 128 weight is from the manifold while noise drives it. --shapes compares more rules, and other
packages' Muon, at several widths: milliseconds, those of the host, kernels (bench_step_rules.py).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from geon.benches import results
from geon.benches import step_rules as bench_step_rules
from geon.benches.solver import check_output, facts, meta, pick_device
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.optim import (
    Group,
    HybridOptimizer,
    Ladder,
    ParamInfo,
    Polar,
    Role,
    Rule,
    Spectral,
    Stiefel,
)
from geon.optim.linalg import ieee_products
from geon.scripts.flags import number, whole

MUON, OURS = "muon", "manifold muon"
RULES = {
    MUON: Rule(Spectral(polar=Polar("keller", 5))),
    OURS: Rule(Spectral(), Stiefel()),
    "oneshot": Rule(Spectral(), Stiefel(), ladder=Ladder("oneshot")),
}
"""Muon is five quintic steps; the others take the defaults of optim=manifold_muon."""
DRIFT_SHAPE = (256, 128)
LR = 0.02


def shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """Query, key, value and output, then up and down, of each layer."""
    return ([(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]) * layers


def optimizer(rule: Rule, grads: Sequence[Tensor]) -> HybridOptimizer:
    """One group of matrices on the manifold; the gradients are shared, not copied."""
    params = []
    for i, grad in enumerate(grads):
        shape = (grad.shape[0], grad.shape[1])
        weight = Spectral().init(shape, torch.Generator().manual_seed(i)).to(grad.device)
        param = nn.Parameter(weight)
        param.grad = grad
        params.append((ParamInfo(f"hidden.{i}", shape, Role.HIDDEN), param))
    return HybridOptimizer([Group("hidden", rule, LR, params)])


def time_steps(layers: int, width: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of a step of each rule, and over Muon's: medians of steps taken in turn."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=generator).to(device) for s in shapes(layers, width)]
    optimizers = {name: optimizer(rule, grads) for name, rule in RULES.items()}
    times: dict[str, list[float]] = {name: [] for name in RULES}
    wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    for repeat in range(1 + repeats):
        for name, own in optimizers.items():
            wait()
            begin = time.perf_counter()
            own.step()
            wait()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - begin)
    # As counted for a CPU, where lgm takes the Gram form.
    flops = {n: sum(rule.flops(s) for s in shapes(layers, width)) for n, rule in RULES.items()}
    return {
        "layers": layers,
        "width": width,
        "matrices": len(grads),
        "seconds": {name: median(own) for name, own in times.items()},
        "over_muon": {
            name: median(t / m for t, m in zip(own, times[MUON], strict=True))
            for name, own in times.items()
        },
        "flops_over_muon": {name: count / flops[MUON] for name, count in flops.items()},
    }


def drift(steps: int, angle: float, device: str) -> Iterator[tuple[int, float]]:
    """Yield (step, largest entry of |W^T W - I| since the last report) ten times.

    Weights are fp32, W^T W is taken in fp64; a gradient is white noise, momentum keeps 0.9.
    """
    rule = Rule(Spectral(), Stiefel(), momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    weight = rule.manifold.random_point(DRIFT_SHAPE, generator).to(device)
    buffer = torch.zeros_like(weight)
    worst = torch.zeros((), dtype=torch.float64, device=device)
    for step in range(1, steps + 1):
        update = rule.average(torch.randn(DRIFT_SHAPE, generator=generator).to(device), buffer)
        with ieee_products():
            weight = rule.move(weight, rule.solve(update, weight).direction, angle)
        # A scale of sqrt(2) as stored would be rounded once more in fp32: it is divided in fp64.
        worst = worst.maximum(rule.manifold.residual(weight.double()))
        if step == steps or step * 10 // steps > (step - 1) * 10 // steps:
            yield step, worst.item()
            worst = torch.zeros_like(worst)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return the report.

    Raises:
        UsageError: names the option.
    """
    for option in ("layers", "width", "repeats"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option} must be at least 1, got {getattr(args, option)}")
    if args.drift < 0 or not 0.0 < args.angle < 1.0:
        raise UsageError(
            f"--drift takes steps, --angle radians between 0 and 1: got {args.drift}, {args.angle}"
        )
    if args.shapes and args.drift:
        raise UsageError("--shapes and --drift are two measurements: give one of them")
    if args.dion and not args.shapes:
        raise UsageError("--dion goes with --shapes")
    check_output(args.json)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = facts(device)
    print(report["hardware"], end="\n\n")
    if args.shapes:
        rows = bench_step_rules.run(args.shapes, args.repeats, device, args.dion)
        return {"rows": rows, "meta": meta(device, "step", args.told)}
    if args.drift:
        d_out, d_in = DRIFT_SHAPE
        print(f"{d_out}x{d_in}, angle {args.angle:g} a step\n    step  max |W^T W - I|")
        report |= {"d_out": d_out, "d_in": d_in, "angle": args.angle, "drift": []}
        for step, residual in drift(args.drift, args.angle, device):
            print(f"{step:8}  {residual:.2e}", flush=True)
            report["drift"].append({"step": step, "residual": residual})
        return report
    found = time_steps(args.layers, args.width, args.repeats, device)
    print(f"{found['matrices']} matrices of {args.layers} layers, width {args.width}")
    print(f"  {'':<14} {'seconds':>9} {'/ Muon':>7} {'FLOPs / Muon':>13}")
    for name, spent in found["seconds"].items():
        over = f"{found['over_muon'][name]:7.2f} {found['flops_over_muon'][name]:13.2f}"
        print(f"  {name:<14} {spent:9.3g} {over}")
    return report | found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=whole(), default=12)
    add("--width", type=whole(), default=768)
    add("--repeats", type=whole(), default=3, help="steps after one to warm up (%(default)s)")
    add("--drift", type=whole(0), default=0, metavar="STEPS", help="follow one weight instead")
    add("--angle", type=number(), default=0.03, help="of each of those steps (%(default)s radians)")
    add(
        "--shapes",
        nargs="?",
        const=bench_step_rules.SHAPES,
        metavar="WIDTHxLAYERS,...",
        help="compare more rules at these; %(const)s where none are given",
    )
    add("--dion", type=Path, metavar="PATH", help="--shapes: a checkout of microsoft/dion")
    add("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    add("--threads", type=whole(0), default=0, help="of a CPU; 0 leaves torch's choice")
    add("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args(arguments)
    args.told = sys.argv[1:] if arguments is None else list(arguments)

    def act() -> None:
        report = run(args)
        if args.json:
            results.write(args.json, report)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
