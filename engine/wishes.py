"""What the config says about the plan: speeds, transports, words on the wire."""

import torch

from geon.configs.schema import Config, Layouts
from geon.errors import UsageError
from geon.optim.shard import MACHINES, Machine, Wishes


def steps_alone(config: Config) -> bool:
    """Whether parameters are stepped one at a time."""
    return config.parallel.layout is Layouts.deepspeed and config.parallel.zero > 0


def make_wishes(config: Config) -> Wishes:
    """What the config says about the plan; zeros leave the machine's own speeds."""
    shard = config.shard
    own = MACHINES[planned_device(config)]
    machine = Machine(
        shard.tflops * 1e12 or own.flops,
        shard.half_tflops * 1e12 or own.half_flops,
        shard.gbytes * 1e9 or own.bandwidth,
        shard.latency_us / 1e6 or own.latency,
    )
    return Wishes(
        shard.transport.value,
        shard.objective.value,
        shard.reproducible,
        shard.max_buffer_mb,
        machine,
    )


def planned_device(config: Config) -> str:
    """Kind of device that the plan is for."""
    chosen = config.shard.machine.value
    if chosen == "auto":
        chosen = config.device if config.device in MACHINES else ""
    return chosen or ("cuda" if torch.cuda.is_available() else "cpu")


def wire_bytes(config: Config) -> int:
    """Bytes of an entry of an update or direction that travels.

    Raises:
        UsageError: a wire that does not go with shard.reproducible.
    """
    chosen = config.shard.wire.value
    if chosen == "bf16" and config.shard.reproducible:
        raise UsageError(
            "shard.reproducible=true needs every bit: set shard.wire=fp32 or auto, not bf16"
        )
    if chosen == "auto":
        half = planned_device(config) == "cuda" and not config.shard.reproducible
        return 2 if half else 4
    return 2 if chosen == "bf16" else 4
