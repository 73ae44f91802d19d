"""Speeds of this machine, for the planner: `python -m geon.scripts.doctor --measure FILE.json`.

Takes under a minute. Products of batches by arithmetic and size, memory, the host's time for an
operator, and with several ranks what an all-to-all takes. Without torchrun, one process measures
products, and two measure the network where the machine has two devices or is a CPU.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from geon.engine.devices import rank_device
from geon.engine.metrics import hardware
from geon.errors import UsageError
from geon.launch.env import read_env
from geon.optim import Group, HybridOptimizer, ParamInfo, Polar, Role, Rule, Spectral, Stiefel
from geon.optim.linalg import Precision, ieee_products
from geon.optim.shard import MACHINES, Machine
from geon.optim.shard.machine import FORMAT, WORD
from geon.scripts.doctor import in_two_processes

SIDES = {"cpu": (32, 64, 128, 256, 512, 1024), "cuda": (128, 256, 512, 768, 1024, 2048, 4096)}
ENTRIES = {"cpu": 2**18, "cuda": 2**25}
"""Of a batch of square matrices; one matrix may have more."""
MEMORY = {"cpu": (128, 24), "cuda": (1024, 64)}
"""Side and number of the matrices whose element-wise work tells the speed of memory."""
MESSAGE_BYTES = {"cpu": 2**23, "cuda": 2**27}
"""What a rank sends each other one."""
SECONDS = 0.2
"""At least, of one measurement, and at least three repeats."""


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Least seconds of something, the first time apart: others may use the machine meanwhile."""
    wait = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    work()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - begin < SECONDS:
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return min(found)


def product_speeds(device: str, precision: Precision) -> list[tuple[int, float]]:
    """(side, FLOP/s) of batches of square matrices, never falling with the side.

    Where a larger product is slower, its speed is taken for that of the smaller one: the planner
    reads one curve, and tells sizes apart to not more than that.
    """
    generator, rates = torch.Generator().manual_seed(0), []
    for side in SIDES[device]:
        batch = max(1, ENTRIES[device] // side**2)
        a = torch.randn(batch, side, side, generator=generator).to(device)
        a = precision.cast(a)
        with ieee_products():
            spent = _seconds(lambda a=a: precision.product(a, a.mT), device)
        rates.append((side, 2 * batch * side**3 / spent))
    best = 0.0
    return [(side, best := max(best, rate)) for side, rate in rates]


def step_seconds(rule: Rule, shape: tuple[int, int], count: int, device: str) -> float:
    """Seconds of a whole step of so many matrices."""
    pairs = []
    for index in range(count):
        weight = Spectral().init(shape, torch.Generator().manual_seed(index)).to(device)
        param = nn.Parameter(weight)
        param.grad = torch.randn(shape, device=device)
        pairs.append((ParamInfo(f"w{index}", shape, Role.HIDDEN), param))
    return _seconds(HybridOptimizer([Group("hidden", rule, 0.02, pairs)]).step, device)


def operator_seconds(device: str) -> float:
    """Seconds of the host for an operator: whole steps of matrices too small to compute on."""
    rules = Rule(Spectral(polar=Polar("keller", 5)), nesterov=True), Rule(Spectral(), Stiefel())
    spent = sum(step_seconds(rule, (16, 8), 4, device) for rule in rules)
    return spent / sum(rule.cost((16, 8), device).operators for rule in rules)


def memory_speed(device: str, speeds: Mapping[str, Any]) -> float:
    """Bytes/s of element-wise work: of a Muon step of one polar step, less its products.

    A loop over large tensors would tell something else: fresh pages, strides and small kernels cost
    what they cost in a step. speeds: of products and operators, which are taken off; no more than
    half of the step, so that an error of theirs does not become one of memory.
    """
    side, count = MEMORY[device]
    rule = Rule(Spectral(polar=Polar("cubic", 1)), nesterov=True, decay=0.1)
    cost = rule.cost((side, side), device).batch(count)
    spent = step_seconds(rule, (side, side), count, device)
    beside = Machine(**speeds, bandwidth=1.0, latency=1.0, device=device)
    others = beside.work(beside.compute(replace(cost, words=0), side), 0)
    if device == "cpu":
        others += cost.operators * speeds["operator"]
    return WORD * cost.words / max(spent - others, spent / 2)


def exchange_speeds(rank: int, device: str) -> dict[str, float]:
    """Seconds of an almost empty all-to-all, and bytes/s that a rank sends in a large one.

    Each of the slowest rank; every rank must call.
    """
    ranks, kind = dist.get_world_size(), device.partition(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(device)

    def spent(words: int) -> float:
        sent = torch.zeros(words * ranks, device=device)
        got, times = torch.empty_like(sent), []
        for _ in range(12):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_to_all_single(got, sent)
            if kind == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        slowest = torch.tensor(median(times[2:]), device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    words = MESSAGE_BYTES[kind] // 4 // ranks
    latency, whole = spent(1), spent(words)
    sent = 4 * words * (ranks - 1)
    return {"latency": latency, "bandwidth": sent / max(whole - latency, 1e-9)}


def measure(device: torch.device) -> dict[str, Any]:
    """Content of a machine file; every rank of a process group must call.

    Speeds are those of the slowest rank. What could not be measured is taken from MACHINES, and
    named under "assumed".
    """
    kind = device.type
    if kind == "cpu":
        # As in a run: glibc keeps freed memory once a block of almost 32 MiB was freed. Until then
        # each step may fault its pages in anew, and memory looks slower than it is.
        torch.zeros(31 * 2**18)
    speeds: dict[str, Any] = {p.value: product_speeds(kind, p) for p in Precision}
    speeds["operator"] = operator_seconds(kind)
    speeds["memory"] = memory_speed(kind, speeds)
    ranks, assumed = 1, []
    if dist.is_initialized():
        ranks = dist.get_world_size()
        speeds = _slowest(speeds, device)
        network = exchange_speeds(dist.get_rank(), str(device)) if ranks > 1 else None
    else:
        network = _two_ranks(kind)
        ranks = 2 if network else 1
    if network is None:
        own = MACHINES[kind]
        network = {"latency": own.latency, "bandwidth": own.bandwidth}
        assumed = list(network)
    machine = Machine.from_dict(
        {"node": 0, "far_bandwidth": 0.0, "device": kind, **speeds, **network}
    )
    return {
        "format": FORMAT,
        "hardware": hardware(kind),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "assumed": assumed,
        "machine": machine.to_dict(),
    }


def _two_ranks(kind: str) -> dict[str, float] | None:
    """What two processes of this machine send each other; None where it has one GPU."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        return None
    found = in_two_processes(exchange_speeds, "nccl" if kind == "cuda" else "gloo", seconds=60)
    if not found["ok"]:
        raise UsageError(f"two processes cannot exchange anything: {found['error']}")
    return found["found"]


def _slowest(speeds: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Speeds of the slowest rank in each, and the longest time of an operator."""
    names = [p.value for p in Precision]
    flat = [rate for name in names for _, rate in speeds[name]]
    own = torch.tensor([*flat, speeds["memory"], 1 / speeds["operator"]], dtype=torch.float64)
    own = own.to(device)
    dist.all_reduce(own, op=dist.ReduceOp.MIN)
    least = own.tolist()
    found: dict[str, Any] = {"operator": 1 / least.pop(), "memory": least.pop()}
    for name in names:
        found[name] = [(side, least.pop(0)) for side, _ in speeds[name]]
    return found


def main(path: str, device: str) -> int:
    """Measure, write the file, and print what is in it; returns the exit status."""
    try:
        if not path.endswith(".json"):
            raise UsageError(f"--measure '{path}' must end in .json, as shard.machine takes it")
        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--measure '{path}': there is no folder '{Path(path).parent}'")
        env = read_env()
        place = rank_device(device, env)
        if env.launched:
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        content = measure(place)
    except UsageError as error:
        print(f"geon: error: {error}", file=sys.stderr)
        return 2
    if env.main:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
        print(render(content))
    if env.launched:
        dist.destroy_process_group()
    return 0


def render(content: dict[str, Any]) -> str:
    """The speeds in lines."""
    speeds = content["machine"]
    lines = [f"{content['hardware']}, {content['ranks']} ranks, {content['threads']} threads each"]
    for name in (p.value for p in Precision):
        told = ", ".join(f"{side}: {rate / 1e9:,.0f}" for side, rate in speeds[name])
        lines.append(f"  {name:<10} {told} GFLOP/s")
    lines.append(f"  memory     {speeds['memory'] / 1e9:,.1f} GB/s")
    lines.append(f"  operator   {speeds['operator'] * 1e6:,.1f} us")
    found = f"{speeds['bandwidth'] / 1e9:,.2f} GB/s, {speeds['latency'] * 1e6:,.0f} us"
    assumed = " (assumed: it takes two devices to measure)" if content["assumed"] else ""
    return "\n".join([*lines, f"  network    {found} a collective{assumed}"])
