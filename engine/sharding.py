"""What the config says about the exchange: speeds, transports, words on the wire."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from geon.configs.schema import Config, Layouts
from geon.errors import UsageError, nearest
from geon.optim.shard import MACHINES, Machine, Sharding, constant, read_machine


def make_sharding(config: Config) -> Sharding:
    """What the config says about the exchange; zeros leave the machine's own speeds.

    The three products that bf16x3 is made of are in bf16 on a GPU, and in fp32 on a CPU.

    Raises:
        UsageError: an unknown machine, or a file that holds none.
    """
    shard, own = config.shard, _machine(config)
    tripled = shard.half_tflops if own.device == "cuda" else shard.tflops
    machine = replace(
        own,
        fp32=constant(shard.tflops * 1e12) if shard.tflops else own.fp32,
        bf16=constant(shard.half_tflops * 1e12) if shard.half_tflops else own.bf16,
        bf16x3=constant(tripled / 3 * 1e12) if tripled else own.bf16x3,
        bandwidth=shard.gbytes * 1e9 or own.bandwidth,
        latency=shard.latency_us / 1e6 or own.latency,
    )
    wire = shard.wire.value
    if wire == "auto":
        wire = "bf16" if own.device == "cuda" and not shard.reproducible else "fp32"
    return Sharding(
        shard.transport.value,
        shard.objective.value,
        shard.reproducible,
        shard.max_buffer_mb,
        wire,
        machine,
        by_parameter=config.parallel.layout is Layouts.deepspeed and config.parallel.zero > 0,
    )


def planned_device(config: Config) -> str:
    """Kind of device that computes: the run's, or that of the machine which is planned for."""
    return _machine(config).device


def _machine(config: Config) -> Machine:
    """The machine that is planned for; auto is one with the run's device."""
    name = config.shard.machine
    if name == "auto":
        name = config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.endswith(".json"):
        return _measured(name)
    if name not in MACHINES:
        raise UsageError(
            f"shard.machine '{name}' is not one of auto, {', '.join(MACHINES)}, nor a file that "
            f"ends in .json.{nearest(name, list(MACHINES))}"
        )
    return MACHINES[name]


@cache
def _measured(path: str) -> Machine:
    """The machine of a file, read once: a run does not change its plan half way."""
    try:
        return read_machine(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UsageError(
            f"shard.machine '{path}': {told}; `python -m geon.scripts.doctor --measure {path}` "
            "writes such a file"
        ) from None
