"""What the config says about the exchange: speeds, transports, words on the wire."""

from dataclasses import replace

import torch

from geon.configs.schema import Config, Layouts
from geon.errors import UsageError, nearest
from geon.optim.shard import MACHINES, Machine, Sharding


def make_sharding(config: Config) -> Sharding:
    """What the config says about the exchange; zeros leave the machine's own speeds.

    Raises:
        UsageError: an unknown machine.
    """
    shard, own = config.shard, _machine(config)
    machine = replace(
        own,
        flops=shard.tflops * 1e12 or own.flops,
        half_flops=shard.half_tflops * 1e12 or own.half_flops,
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
    if name not in MACHINES:
        raise UsageError(
            f"shard.machine '{name}' is not one of auto, {', '.join(MACHINES)}."
            f"{nearest(name, list(MACHINES))}"
        )
    return MACHINES[name]
