"""The micro-batch that fits a device, and what to do where none does."""

from collections.abc import Callable
from pathlib import Path

import torch

from geon.configs.schema import Config, Layouts
from geon.engine.images import predict_images
from geon.engine.memory import Prediction, predict
from geon.engine.parallel import Parallel, mesh_shape
from geon.errors import UsageError
from geon.models import ImageModel, LanguageModel
from geon.optim.routing import Routing
from geon.optim.shard import Plan

GPU_TOKENS = 65536
"""Tokens of a forward pass on a GPU that are worth while: more take as long each."""

ROOM = 0.9
"""Share of a GPU's memory that is planned with: the rest is its context and fragmentation."""

PLANNED_GB = 80.0
"""Memory of a GPU that is planned for and not here: an A100's or H100's."""


def keys_to_try(layout: Layouts, now: Prediction | None = None) -> list[str]:
    """What needs less memory, in the order to try."""
    lower = f" (now {now.micro_batch})" if now and now.micro_batch > 1 else ""
    keys = [f"data.micro_batch lower{lower}"] if now is None or lower else []
    keys += ["parallel.activation_checkpointing=true", "parallel.loss_chunks higher"]
    sharded = layout in (Layouts.fsdp, Layouts.hsdp)
    return [*keys, "more ranks" if sharded else "parallel=fsdp on several ranks"]


def available_bytes(device: torch.device, local_world: int) -> float:
    """Memory that a run may plan with on this rank; infinite where the system does not tell.

    local_world: ranks on this machine, which share a CPU's memory.
    """
    if device.type == "cuda":
        return ROOM * torch.cuda.get_device_properties(device).total_memory
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024 / local_world
    return float("inf")


def planned_bytes(config: Config, kind: str) -> float:
    """Memory that mode=plan reckons with, for a device of a kind (cpu, cuda)."""
    if config.plan.memory_gb:
        return ROOM * config.plan.memory_gb * 1e9
    if kind == "cuda" and not torch.cuda.is_available():
        return ROOM * PLANNED_GB * 1e9
    return available_bytes(torch.device(kind), 1)


def choose(
    config: Config,
    model: LanguageModel,
    routing: Routing,
    plan: Plan,
    world: int,
    kind: str,
    room: float,
) -> Prediction:
    """The prediction for a run's micro-batch and loss chunks, chosen where the config says 0.

    The largest micro-batch that divides a rank's share and fits; on a GPU of GPU_TOKENS at most.
    One that the config asks for is taken as it is. Pure: ranks with the same `room` agree.

    room: bytes that may be used.
    """

    def predicted(micro: int, chunks: int) -> Prediction:
        if isinstance(model, ImageModel):
            return predict_images(config, model, routing, plan, world, kind, micro)
        return predict(config, model, routing, plan, world, kind, micro, chunks)

    context, asked = config.model.context, config.data.micro_batch
    chunks = config.parallel.loss_chunks or 1
    if asked:
        return predicted(asked, chunks)
    readers = world // mesh_shape(config.parallel, world).get("tensor", 1)
    share = max(1, config.data.batch_tokens // context // readers)
    most = max(1, GPU_TOKENS // context) if kind == "cuda" else share
    sizes = [n for n in range(min(share, most), 0, -1) if share % n == 0]
    found = _first(sizes, lambda micro: predicted(micro, chunks), room)
    if found.peak > room and not config.parallel.loss_chunks:
        pieces = [2**n for n in range(1, 20) if 2**n <= context]
        cut = _first(pieces, lambda count: predicted(1, count), room) if pieces else found
        found = min(found, cut, key=_size)  # uncut where cutting gains nothing
    return found


def refusal(found: Prediction, config: Config, room: float) -> str | None:
    """Why a chosen micro-batch cannot run in `room` bytes, and what to try; None if it can.

    A micro-batch that the config asks for is not refused: the prediction may be wrong.
    """
    if config.data.micro_batch or found.peak <= room:
        return None
    return (
        f"one sequence of model.context {config.model.context} needs {found.peak / 2**30:.2f} GiB "
        f"of memory on a rank, and {room / 2**30:.2f} GiB may be used. "
        f"Try in this order: {', '.join(keys_to_try(config.parallel.layout, found))}; or set "
        f"data.micro_batch={found.micro_batch}, which is tried as it is"
    )


def fit(
    config: Config, model: LanguageModel, routing: Routing, plan: Plan, parallel: Parallel
) -> Prediction:
    """Choose for the ranks that are there, before anything is allocated; every rank must call.

    Raises:
        UsageError: on every rank, where not even one sequence fits.
    """
    own = available_bytes(parallel.device, parallel.env.local_world)
    room, world = min(parallel.gather(own)), parallel.env.world
    found = choose(config, model, routing, plan, world, parallel.device.type, room)
    if (reason := refusal(found, config, room)) is not None:
        raise UsageError(f"{reason}\n{found.table()}")
    return found


def _first(values: list[int], prediction: Callable[[int], Prediction], room: float) -> Prediction:
    """The first prediction that fits, or the smallest."""
    tried: list[Prediction] = []
    for value in values:
        tried.append(prediction(value))
        if tried[-1].peak <= room:
            return tried[-1]
    return min(tried, key=_size)


def _size(found: Prediction) -> tuple[int, int, int]:
    """What the smallest prediction has least of; the optimizer's step does not see the batch."""
    return found.peak, found.micro_batch, found.loss_chunks
