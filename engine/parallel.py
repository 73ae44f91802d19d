"""How the model lies over the ranks: single, DDP, FSDP2, HSDP. The process group's lifetime."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from geon.configs.schema import Layouts, ParallelConfig, Precision
from geon.errors import UsageError
from geon.launch.env import Env
from geon.models import LanguageModel
from geon.optim.shard import Grid, Layout


def shard_ranks(config: ParallelConfig, world: int) -> int:
    """Ranks that one copy of the model is sharded over.

    Raises:
        UsageError: the layout does not fit the number of ranks.
    """
    if config.layout is Layouts.single and world != 1:
        raise UsageError(
            f"parallel=single runs one process, but WORLD_SIZE is {world}: use parallel=ddp, fsdp "
            "or hsdp, or start without torchrun"
        )
    if config.layout is Layouts.hsdp:
        if world % config.replicas or world // config.replicas < 2:
            raise UsageError(
                f"parallel.replicas {config.replicas} does not fit {world} ranks: parallel=hsdp "
                "needs replicas x at least 2 shards"
            )
        return world // config.replicas
    return world if config.layout is Layouts.fsdp else 1


def planned_layout(shape: tuple[int, ...], config: ParallelConfig, world: int) -> Layout:
    """Layout that a parameter will have, known without a process group.

    Vectors are seen as (1, n), so FSDP2, which cuts dimension 0, cuts their columns.
    """
    ranks = shard_ranks(config, world)
    return Grid.rows(shape, ranks) if ranks > 1 else Grid.whole(shape, world)


def pick_device(name: str, local_rank: int) -> torch.device:
    """Device of this rank.

    Raises:
        UsageError: a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"device=cuda: local rank {local_rank} needs GPU {local_rank}, this machine has "
            f"{torch.cuda.device_count()}; use fewer ranks per node or device=cpu"
        )
    return torch.device("cuda", local_rank)


@dataclass
class Parallel:
    """The ranks of a run and what they share."""

    config: ParallelConfig
    env: Env
    device: torch.device
    mesh: DeviceMesh | None = None
    _module: nn.Module | None = field(default=None, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the model."""
        chosen = self.config.precision
        if chosen is Precision.auto:
            chosen = Precision.bf16 if self.device.type == "cuda" else Precision.fp32
        return torch.bfloat16 if chosen is Precision.bf16 else torch.float32

    @property
    def sharded(self) -> bool:
        """Whether weights are DTensors."""
        return self.mesh is not None and self.config.layout in (Layouts.fsdp, Layouts.hsdp)

    def place(self, model: LanguageModel) -> None:
        """Shard a model that lives on the meta device, and allocate its weights, unset."""
        if self.sharded:
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
            if self.dtype is torch.float32:
                policy = MixedPrecisionPolicy()
            for unit in model.shard_units():
                fully_shard(unit, mesh=self.mesh, mp_policy=policy)
            fully_shard(model, mesh=self.mesh, mp_policy=policy)
        model.to_empty(device=self.device)

    def wrap(self, model: LanguageModel) -> None:
        """Prepare forward and backward, once the weights are set."""
        model.checkpoint_activations = self.config.activation_checkpointing
        if self.config.compile:
            for unit in model.shard_units():
                unit.compile()
        self._module = model
        if self.mesh is not None and not self.sharded:
            from torch.nn.parallel import DistributedDataParallel

            self._module = DistributedDataParallel(model, process_group=self.mesh.get_group())

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of this rank's micro-batch."""
        assert self._module is not None
        if self.sharded or self.dtype is torch.float32:
            return self._module(tokens, targets)
        with torch.autocast(self.device.type, self.dtype):
            return self._module(tokens, targets)

    @contextmanager
    def gradients(self, last: bool) -> Iterator[None]:
        """Around one micro-batch: gradients are averaged over ranks only in the last one."""
        if self.sharded:
            self._module.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
            yield
        elif self.mesh is not None and not last:
            with self._module.no_sync():  # type: ignore[union-attr, operator]
                yield
        else:
            yield

    def mean(self, value: Tensor) -> Tensor:
        """Average over all ranks."""
        return self.sum(value) / self.env.world

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks."""
        if self.mesh is None:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def from_main(self, value: float) -> float:
        """The main rank's number, on every rank."""
        if self.mesh is None:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return box.item()

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.mesh is not None:
            dist.barrier()


def start(config: ParallelConfig, device: str, env: Env) -> Parallel:
    """Check that layout, ranks and device fit, then join the process group.

    Raises:
        UsageError: before any process group exists.
    """
    ranks = shard_ranks(config, env.world)
    place = pick_device(device, env.local_rank)
    if not env.launched:
        return Parallel(config, env, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=timedelta(seconds=config.timeout_seconds),
    )
    if config.layout is Layouts.hsdp:
        sizes, names = (config.replicas, ranks), ("replicate", "shard")
    else:
        sizes, names = (env.world,), ("shard" if ranks > 1 else "replicate",)
    return Parallel(config, env, place, init_device_mesh(place.type, sizes, mesh_dim_names=names))
