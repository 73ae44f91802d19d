"""How the model lies over the ranks: DDP, FSDP2, HSDP, tensor parallel; the process group."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from geon.configs.schema import Layouts, ModelConfig, ParallelConfig
from geon.engine.devices import arithmetic, pick_device, share_gpus
from geon.engine.rendezvous import join
from geon.errors import UsageError
from geon.launch.env import Env
from geon.models import LanguageModel, shape_of
from geon.models.tensor import SummedGains
from geon.optim import HybridOptimizer, ParamInfo, Role
from geon.optim.shard import Flat, Grid, Layout


def mesh_shape(config: ParallelConfig, world: int) -> dict[str, int]:
    """Names and sizes of the mesh dimensions, outermost first.

    Raises:
        UsageError: the layout does not fit the number of ranks.
    """
    if config.layout is Layouts.single and world != 1:
        raise UsageError(
            f"parallel=single runs one process, not {world} (WORLD_SIZE, or plan.world_size): use "
            "parallel=ddp, fsdp or hsdp, or start without torchrun"
        )
    if config.layout is Layouts.tp:
        return {"tensor": world}
    tensor = config.tensor
    if config.layout not in (Layouts.fsdp, Layouts.hsdp):
        if tensor != 1:
            raise UsageError(
                f"parallel.tensor {tensor} goes with parallel=fsdp or hsdp, not "
                f"{config.layout.value}; parallel=tp takes all ranks"
            )
        return {"replicate": world}
    if world % tensor:
        raise UsageError(f"parallel.tensor {tensor} does not divide {world} ranks")
    inner = {"tensor": tensor} if tensor > 1 else {}
    shards = world // tensor
    if config.layout is Layouts.fsdp:
        return {"shard": shards, **inner}
    if shards % config.replicas or shards // config.replicas < 2:
        raise UsageError(
            f"parallel.replicas {config.replicas} does not fit {world} ranks: parallel=hsdp "
            f"needs replicas x at least 2 shards{f' x {tensor} tensor ranks' if inner else ''}"
        )
    return {"replicate": config.replicas, "shard": shards // config.replicas, **inner}


def check_layout(config: ParallelConfig, model: ModelConfig, world: int) -> None:
    """Refuse a layout that does not fit the ranks or the model, before any process group exists.

    Raises:
        UsageError: names the keys.
    """
    tensor = mesh_shape(config, world).get("tensor", 1)
    if tensor > 1:
        known = model.vocab_size or 1  # 0: the data's, not yet read
        shape_of(asdict(model) | {"vocab_size": known}).check_tensor(tensor)


def _long_side_cut(shape: Sequence[int], cut: int, ranks: int) -> bool:
    """Whether FSDP2 cuts the columns: of a wide matrix, where they divide.

    cut: ranks of tensor parallelism that have cut the columns before.
    """
    return len(shape) == 2 and shape[0] < shape[1] and shape[1] % (cut * ranks) == 0


def planned_cuts(
    model: LanguageModel, config: ParallelConfig, world: int
) -> dict[str, dict[str, int]]:
    """Per parameter, axis of the stored tensor that each mesh dimension cuts, in order of cutting.

    Tensor parallelism cuts first, FSDP2 what that left; dimensions that copy are left out. Needs
    no process group. DeepSpeed's runs of entries cut no axis: see planned_layouts.
    """
    sizes = mesh_shape(config, world)
    styles = model.tp_plan() if sizes.get("tensor", 1) > 1 else {}
    planned: dict[str, dict[str, int]] = {}
    for info in model.infos:
        cuts = planned.setdefault(info.name, {})
        axis = _tensor_axis(info, styles)
        if axis is not None:
            cuts["tensor"] = axis
        if "shard" in sizes:
            before = sizes["tensor"] if axis == 1 else 1
            wide = config.long_side and info.role is Role.HIDDEN
            cuts["shard"] = int(wide and _long_side_cut(info.shape, before, sizes["shard"]))
    return planned


def planned_flat(info: ParamInfo, config: ParallelConfig, world: int) -> Layout:
    """Layout that DeepSpeed will give a parameter: whole at stage 0, otherwise runs.

    Stages 1 and 2 pad a group to a multiple of 2 ranks (their `nccl_start_alignment_factor`),
    stage 3 each parameter to a multiple of the ranks.
    """
    if config.zero == 0:
        return Grid.whole(info.shape, world)
    unit = 2 * world if config.zero < 3 else world
    return Flat(info.matrix_shape, world, -(-info.numel // unit) * unit // world)


def planned_layouts(model: LanguageModel, config: ParallelConfig, world: int) -> dict[str, Layout]:
    """Layout that each parameter will have, known without a process group."""
    sizes = mesh_shape(config, world)
    if config.layout is Layouts.deepspeed:
        return {i.name: planned_flat(i, config, world) for i in model.infos}
    names, planned = list(sizes), planned_cuts(model, config, world)
    layouts: dict[str, Layout] = {}
    for info in model.infos:
        cuts = tuple((names.index(dim), axis) for dim, axis in planned[info.name].items())
        layouts[info.name] = Grid(info.shape, tuple(sizes.values()), cuts)
    return layouts


def _tensor_axis(info: ParamInfo, styles: Mapping[str, Any]) -> int | None:
    """Axis that tensor parallelism cuts of a parameter, if any."""
    module, leaf = info.name.rsplit(".", 1)
    style = next((s for pattern, s in styles.items() if fnmatchcase(module, pattern)), None)
    if style is None or isinstance(style, SummedGains):
        return None
    by_rows = type(style).__name__ == "ColwiseParallel"
    if leaf == "bias":
        return 0 if by_rows else None
    # Of an embedding, "rowwise" means tokens, which torch stores as rows.
    return 0 if by_rows or info.role is Role.EMBEDDING else 1


@dataclass
class Parallel:
    """The ranks of a run and what they share."""

    config: ParallelConfig
    env: Env
    device: torch.device
    mesh: DeviceMesh | None = None
    backend: Any = None
    """A framework that runs model and gradients (engine/backends.py)."""
    loss_chunks: int = 0
    """Chosen pieces of the logits (engine/fitting.py); 0 takes the config's."""
    store: dist.Store | None = None
    """Where the ranks of this attempt leave word for each other; None in one process."""
    phase: str = "start"
    """What this rank is doing, for engine/watch.py: forward, backward, update, or a callback."""
    entries: int = 0
    """How often a phase was entered: it grows as long as a run moves."""
    _module: nn.Module | None = field(default=None, repr=False)

    def enter(self, phase: str) -> None:
        """Note what this rank does from here on."""
        self.phase = phase
        self.entries += 1

    @property
    def compiles(self) -> bool:
        """Whether forward and backward of the model are compiled."""
        chosen = self.config.compile
        if chosen is None:
            return self.device.type == "cuda" and self.config.layout is not Layouts.deepspeed
        return chosen

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the model's arithmetic."""
        return arithmetic(self.config.precision, self.device.type)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the weights."""
        return self.mesh is not None and self.config.layout in (Layouts.fsdp, Layouts.hsdp)

    @property
    def tensor(self) -> int:
        """Ranks that share one model and read the same tokens; they are next to each other."""
        return mesh_shape(self.config, self.env.world).get("tensor", 1)

    def place(self, model: LanguageModel) -> None:
        """Shard a model that lives on the meta device, and allocate its weights, unset."""
        if self.tensor > 1:
            from torch.distributed.tensor.parallel import parallelize_module

            parallelize_module(model, self._submesh("tensor"), model.tp_plan())
        if self.sharded:
            self._shard(model)
        model.to_empty(device=self.device)

    def _submesh(self, *names: str) -> DeviceMesh:
        assert self.mesh is not None
        return self.mesh[names if len(names) > 1 else names[0]] if self.mesh.ndim > 1 else self.mesh

    def _shard(self, model: LanguageModel) -> None:
        """Apply FSDP2 to a model, unit by unit."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        names = [n for n in ("replicate", "shard") if n in mesh_shape(self.config, self.env.world)]
        mesh = self._submesh(*names)
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        if self.dtype is torch.float32:
            policy = MixedPrecisionPolicy()
        cuts = planned_cuts(model, self.config, self.env.world)
        axes = {id(param): cuts[name]["shard"] for name, param in model.named_parameters()}

        def placement(param: nn.Parameter) -> Shard:
            return Shard(axes[id(param)])

        for unit in [*model.shard_units(), model]:
            fully_shard(unit, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)

    def wrap(self, model: LanguageModel) -> None:
        """Prepare forward and backward of a model, once its weights are set."""
        model.checkpoint_activations = self.config.activation_checkpointing
        model.loss_chunks = self.loss_chunks or self.config.loss_chunks or 1
        self._module = self._compiled(model) if self.compiles else model
        if self.mesh is not None and self.config.layout is Layouts.ddp:
            from torch.nn.parallel import DistributedDataParallel

            self._module = DistributedDataParallel(
                self._module, process_group=self.mesh.get_group()
            )

    def _compiled(self, model: LanguageModel) -> nn.Module:
        """The model, compiled as a whole, or where its units are cut over ranks, unit by unit.

        A whole model is compiled beside itself: `model` and its parameters' names stay. Units keep
        the hooks that gather and cut their weights outside of what is compiled.
        """
        if self.config.layout in (Layouts.single, Layouts.ddp):
            # Dynamo would cut the graph where DDP's buckets end, which it cannot inside of the
            # loss, and around activation checkpoints: "no higher order op".
            torch._dynamo.config.optimize_ddp = False
            return torch.compile(model, dynamic=False)  # type: ignore[return-value]
        for unit in model.shard_units():
            unit.forward = torch.compile(unit.forward, dynamic=False)
        model.loss = torch.compile(model.loss, dynamic=False)  # type: ignore[method-assign]
        return model

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Without compiled code: for passes of many shapes, which would each be compiled."""
        if not self.compiles:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of this rank's micro-batch."""
        self.enter("forward")
        if self.backend is not None:
            return self.backend.engine(tokens, targets)
        return self._forward(tokens, targets)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of a batch; not under DeepSpeed."""
        return self._forward(inputs)

    def _forward(self, *inputs: Tensor) -> Tensor:
        assert self._module is not None
        if self.sharded or self.dtype is torch.float32:
            return self._module(*inputs)
        with torch.autocast(self.device.type, self.dtype):
            return self._module(*inputs)

    def reshard(self) -> None:
        """Let go of what FSDP2 holds gathered after a forward pass without a backward pass.

        The root's parameters would stay whole, and in the model's arithmetic: a checkpoint taken
        then would round them to bf16.
        """
        if self.sharded:
            self._module.reshard()  # type: ignore[union-attr, operator]

    @contextmanager
    def gradients(self, last: bool) -> Iterator[None]:
        """Around one micro-batch: gradients are averaged over ranks only in the last one."""
        if self.sharded:
            self._module.set_requires_gradient_sync(last)  # type: ignore[union-attr, operator]
            yield
        elif self.mesh is not None and self.config.layout is Layouts.ddp and not last:
            with self._module.no_sync():  # type: ignore[union-attr, operator]
                yield
        else:
            yield

    def backward(self, loss: Tensor, micros: int, last: bool) -> None:
        """Add the gradients of one of `micros` micro-batches."""
        self.enter("backward")
        if self.backend is not None:
            self.backend.backward(loss, last)
        else:
            (loss / micros).backward()

    def update(self, optimizer: HybridOptimizer) -> None:
        """Step the optimizer, and clear the gradients."""
        self.enter("update")
        if self.backend is not None:
            self.backend.step()
            return
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over all ranks."""
        return self.sum(value) / self.env.world

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.mesh is None:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def count(self, number: int) -> int:
        """Sum of a count over all ranks."""
        if self.mesh is None:
            return number
        return int(self.sum(torch.tensor(float(number), device=self.device)).item())

    def gather(self, content: Any) -> list[Any]:
        """Objects of all ranks, on every rank."""
        if self.mesh is None:
            return [content]
        everyone: list[Any] = [None] * self.env.world
        dist.all_gather_object(everyone, content)
        return everyone

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
    sizes = mesh_shape(config, env.world)
    place = pick_device(device, env.local_rank, config.share_gpu)
    if config.share_gpu:
        share_gpus(config, place, env)
    if not env.launched:
        return Parallel(config, env, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    store = join("nccl" if place.type == "cuda" else "gloo", config.timeout_seconds)
    shape, names = tuple(sizes.values()), tuple(sizes)
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=names)
    return Parallel(config, env, place, mesh, store=store)
