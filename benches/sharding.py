"""Time, bytes, collectives and exactness of sharded steps, beside other implementations.

torchrun --standalone --nproc_per_node=4 benches/sharding.py --json out.json
torchrun --standalone --nproc_per_node=4 benches/sharding.py --half --layouts fsdp --dion PATH
torchrun --standalone --nproc_per_node=4 benches/sharding.py --device cuda --half

For the hidden matrices of a GPT (12 layers of width 192 unless told otherwise), for each rule,
layout and transport: bytes sent per rank, counted where PyTorch hands them to the process group,
beside the plan's and the least possible; collectives; seconds of a step (median of the slowest
rank); scratch; balance; and how far 10 steps with two micro-batches are from one process.
`torch.optim.Muon` runs on the same DTensors. --dion takes a checkout of microsoft/dion, whose
compiled all-to-all Muon then runs beside ours. Ranks beyond the GPUs share them.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geon.benches import results
from geon.benches.layouts import CONFIGS, LR, Bench, counted, draw, make_model
from geon.benches.solver import check_output
from geon.engine.devices import rank_device
from geon.engine.metrics import hardware
from geon.errors import UsageError
from geon.launch.env import read_env
from geon.launch.leave import guard, leave
from geon.optim import (
    Group,
    HybridOptimizer,
    ParamInfo,
    Polar,
    Precision,
    Rule,
    Sharding,
    Spectral,
    Stiefel,
)
from geon.optim.shard import MACHINES, Job, Plan
from geon.optim.shard.sharding import CHOICES, OBJECTIVES
from geon.scripts.flags import number, whole

STEPS, ACCUMULATION = 10, 2


def rules(half: bool) -> dict[str, Rule]:
    """Muon with K. Jordan's five steps, in bf16 with --half; Manifold Muon by LGM in fp32."""
    precision = Precision.BF16 if half else Precision.FP32
    exact = Spectral(polar=Polar(precision=Precision.FP32))
    return {
        "muon": Rule(Spectral("muon", Polar("keller", 5, precision)), nesterov=True),
        "manifold_muon": Rule(exact, Stiefel(), nesterov=True),
    }


@cache
def _grads(infos: tuple[ParamInfo, ...], step: int) -> dict[str, Tensor]:
    micros = range(ACCUMULATION)
    return {
        i.name: torch.stack([draw(i, 1 + step, 100 * micro) for micro in micros]).mean(dim=0)
        for i in infos
    }


def grads_of(infos: Mapping[str, ParamInfo], step: int) -> dict[str, Tensor]:
    """Mean of two micro-batches; the same every time."""
    return _grads(tuple(infos.values()), step)


Trace = tuple[dict[str, Tensor], list[float]]


def reference(bench: Bench) -> Trace:
    """Weights after 10 steps on one process, and the descent of each step of each matrix."""
    params = {n: nn.Parameter(bench.start(n)) for n in bench.infos}
    pairs = [(bench.infos[n], p) for n, p in params.items()]
    optimizer = HybridOptimizer([Group("hidden", bench.rule, LR, pairs)])
    descents: list[float] = []
    for step in range(STEPS):
        grads = {n: g.to(bench.device) for n, g in grads_of(bench.infos, step).items()}
        before = {n: p.detach().clone() for n, p in params.items()}
        for n, p in params.items():
            p.grad = grads[n]
        optimizer.step()
        descents += [_inner(grads[n], before[n] - p.detach()) for n, p in params.items()]
    return {n: p.detach() for n, p in params.items()}, descents


def errors(bench: Bench, alone: Trace) -> dict[str, float]:
    """Largest relative error of a weight after as many steps, and of what a step descends.

    Descent is <gradient, step>: of a whole step, over all matrices, and of the worst matrix.
    """
    weights, descents = alone
    own: list[Tensor] = []
    for step in range(STEPS):
        bench.set_grads(grads_of(bench.infos, step))
        before = bench.locals()
        bench.step()
        own.append(bench.descents(before))
    mine = torch.stack(own)
    dist.all_reduce(mine)
    others = torch.tensor(descents).view(mine.shape).to(mine)
    sums = mine.sum(dim=1), others.sum(dim=1)
    worst = max(float((bench.whole(n) - w).norm() / w.norm()) for n, w in weights.items())
    return {
        "max_rel_error": worst,
        "descent_rel_error": float(((sums[0] - sums[1]) / sums[1]).abs().max()),
        "descent_rel_error_of_worst_matrix": float(((mine - others) / others).abs().max()),
    }


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def timed(
    step: Callable[[], None], device: torch.device, repeats: int, warm: int
) -> dict[str, float]:
    """Median and least seconds of a step, of the slowest rank each time."""
    found = []
    for repeat in range(warm + repeats):
        dist.barrier()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = torch.tensor(time.perf_counter() - begin, device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if repeat >= warm:
            found.append(spent.item())
    return {"seconds": median(found), "seconds_min": min(found)}


def measure(
    step: Callable[[], None], device: torch.device, repeats: int, warm: int = 2
) -> dict[str, Any]:
    """Counted bytes (mean over ranks and of the busiest), collectives, seconds."""
    step()
    with counted() as counter:
        step()
    sent = [torch.zeros(1, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sent, torch.tensor([float(counter.bytes)], device=device))
    return {
        "bytes_per_rank": float(torch.cat(sent).mean()),
        "bytes_busiest": float(torch.cat(sent).max()),
        "collectives": counter.collectives,
        **timed(step, device, repeats, warm),
    }


def words_sent(job: Job) -> int:
    """Words that travel for a matrix, whatever their width, over all ranks."""
    return sum(count for message in (*job.down, *job.up) for count, _ in message.words)


def planned(plan: Plan) -> dict[str, Any]:
    """What the plan says about the same."""
    totals = plan.totals()
    return {
        "predicted_bytes": sum(plan.bytes_sent) / plan.ranks,
        "words_per_rank": sum(words_sent(job) for job in plan.jobs) / plan.ranks,
        "lower_bound_words": plan.lower_bound_words(),
        "buckets": len(plan.buckets),
        "collectives_per_bucket": max((b.collectives for b in plan.buckets), default=0),
        "peak_buffer_bytes": plan.peak_buffer,
        "balance": totals["owner_balance"],
        "predicted_seconds": plan.seconds,
        "transports": sorted({str(job.transport) for job in plan.jobs}),
    }


def own_rows(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of our transports."""
    rows = []
    wire = "bf16" if arguments.half else "fp32"
    ranks = dist.get_world_size()
    for rule_name, rule in rules(arguments.half).items():
        alone: Trace | None = None
        for layout in arguments.layouts:
            for transport in arguments.transports:
                model = make_model(arguments.layers, arguments.width)
                bench = Bench(layout, model, rule, ranks, device)
                sharding = Sharding(
                    transport,
                    arguments.objective,
                    max_buffer_mb=arguments.buffer_mb,
                    wire=wire,
                    machine=MACHINES[device.type],
                )
                optimizer = bench.make(sharding)
                if alone is None and not arguments.no_errors:
                    alone = reference(bench)
                row = {"rule": rule_name, "layout": layout, "transport": transport}
                if alone is not None:
                    row |= errors(bench, alone)
                else:
                    bench.set_grads(grads_of(bench.infos, 0))
                row |= measure(bench.step, device, arguments.repeats) | planned(optimizer.plan)
                rows.append(_told(row))
    return rows


def peer_rows(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """torch.optim.Muon, and microsoft/dion where its checkout is given, on the same DTensors."""
    rows = []
    rule = rules(arguments.half)["muon"]
    for layout in [name for name in arguments.layouts if name in ("fsdp", "tp")]:
        model = make_model(arguments.layers, arguments.width)
        bench = Bench(layout, model, rule, dist.get_world_size(), device)
        bench.make(Sharding())
        bench.set_grads(grads_of(bench.infos, 0))
        params = list(bench.params.values())
        if not arguments.no_torch:
            torch_muon = torch.optim.Muon(params, lr=LR, momentum=0.95, weight_decay=0.0)
            row = {"rule": "muon", "layout": layout, "transport": "torch.optim.Muon"}
            rows.append(_told(row | measure(torch_muon.step, device, 2, warm=0)))
        if arguments.dion and layout == "fsdp":
            rows.append(_told(_dion_row(arguments, bench)))
    return rows


def _dion_row(arguments: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    sys.path.insert(0, arguments.dion)
    from dion import Muon  # type: ignore[import-not-found]

    params = list(bench.params.values())
    dion = Muon(
        params, bench.parallel.mesh, LR, weight_decay=0.0, nesterov=True, use_polar_express=False
    )
    row = {"rule": "muon", "layout": bench.layout, "transport": "microsoft/dion Muon"}
    # What is compiled cannot be counted from inside; its wire is bf16, all-to-all both ways.
    return row | timed(dion.step, bench.device, arguments.repeats, warm=5)


def _told(row: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == 0:
        error, sent = row.get("max_rel_error"), row.get("bytes_per_rank")
        exact = "" if error is None else f"error {error:.1e}, {row['descent_rel_error']:.1e}"
        size = f"{'not counted':>26}"
        if sent is not None:
            size = f"{sent / 1024:>10,.0f} KiB {row['collectives']:>5} calls"
        print(
            f"{row['rule']:<14} {row['layout']:<13} {row['transport']:<20} {size} "
            f"{row['seconds']:>8.4f} s  {exact}",
            flush=True,
        )
    return row


def facts(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    return {
        device.type: hardware(device.type),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads_per_rank": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "date": date.today().isoformat(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench on the ranks that torchrun started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows here")
    parser.add_argument("--layers", type=whole(), default=12)
    parser.add_argument("--width", type=whole(), default=192, help="a multiple of 16 x ranks")
    parser.add_argument("--layouts", nargs="+", default=["ddp", "fsdp", "tp"], choices=CONFIGS)
    parser.add_argument("--transports", nargs="+", default=CHOICES, choices=CHOICES)
    parser.add_argument("--objective", default="time", choices=OBJECTIVES)
    parser.add_argument("--buffer-mb", type=number(), default=64.0)
    parser.add_argument("--repeats", type=whole(), default=9)
    parser.add_argument("--half", action="store_true", help="Muon in bf16, bf16 wire")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-errors", action="store_true", help="times and bytes alone")
    parser.add_argument("--no-torch", action="store_true", help="without torch.optim.Muon")
    parser.add_argument("--dion", help="a checkout of microsoft/dion")
    arguments = parser.parse_args(argv)
    check_output(arguments.json)
    device = rank_device(arguments.device, read_env())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    if arguments.width % (16 * ranks):
        raise UsageError(f"--width {arguments.width} must be a multiple of 16 x {ranks} ranks")
    peers = peer_rows(arguments, device)
    rows = own_rows(arguments, device) + peers
    if dist.get_rank() == 0 and arguments.json is not None:
        content = {
            "hardware": facts(device),
            "world_size": ranks,
            "layers": arguments.layers,
            "width": arguments.width,
            "half": arguments.half,
            "objective": arguments.objective,
            "command": " ".join(sys.argv[1:]).replace(arguments.dion or "\0", "PATH"),
            "rows": rows,
        }
        results.write(arguments.json, content)


if __name__ == "__main__":
    leave(guard(main))
