"""DeepSpeed: its engine runs the model and the gradients, our optimizer the step.

DeepSpeed's ZeRO flattens each param group and gives each rank a run of it. With one param group a
parameter, that is a layout like any other (`Flat`): the optimizer adopts the runs and exchanges
matrices as under FSDP2. ZeRO calls `step()` once for each param group, so matrices travel one by
one. DeepSpeed's own Muon is not used: it picks weights by name, and takes embeddings along.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor

from geon.configs.schema import Config, ParallelConfig
from geon.errors import UsageError
from geon.launch.env import default
from geon.models import LanguageModel
from geon.optim import AdamW, HybridOptimizer, ParamInfo
from geon.optim.shard import Arena, Flat, Grid, Layout


def planned_flat(info: ParamInfo, config: ParallelConfig, world: int) -> Layout:
    """Layout that DeepSpeed will give a parameter: whole at stage 0, otherwise runs.

    Stages 1 and 2 pad a group to a multiple of 2 ranks (their `nccl_start_alignment_factor`),
    stage 3 each parameter to a multiple of the ranks.
    """
    if config.zero == 0:
        return Grid.whole(info.shape, world)
    unit = 2 * world if config.zero < 3 else world
    return Flat(info.matrix_shape, world, -(-info.numel // unit) * unit // world)


def check_deepspeed(config: Config, optimizer: HybridOptimizer) -> None:
    """Refuse what a step of one parameter at a time cannot do.

    Raises:
        UsageError: names the keys.
    """
    if config.optim.record_pairs:
        raise UsageError(
            "optim.record_pairs with parallel=deepspeed: its gradients are not to be seen before "
            "a step; record with parallel=ddp or fsdp, which step alike"
        )
    entries = [name for name, rule in optimizer.rules.items() if isinstance(rule, AdamW)]
    if config.parallel.zero and config.optim.max_norm and entries:
        raise UsageError(
            f"optim.max_norm {config.optim.max_norm} with parallel=deepspeed: ZeRO steps one "
            f"parameter at a time, so the norm over all of {', '.join(entries)} is not known "
            "when they are stepped; set optim.max_norm=0 (matrices need no clipping), or use "
            "parallel=fsdp"
        )


class DeepSpeed:
    """A DeepSpeed engine around a model and an optimizer that has adopted its runs.

    Attributes:
        engine: what `deepspeed.initialize` returned; call it like the model.
        stage: of ZeRO.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        optimizer: HybridOptimizer,
        micro_batch: int,
        accumulation: int,
        half: bool,
    ) -> None:
        """Initialise DeepSpeed on the process group that exists."""
        check_deepspeed(config, optimizer)
        self.stage, self._model, self._optimizer = config.parallel.zero, model, optimizer
        self._infos = {info.name: info for info in model.infos}
        device = next(model.parameters()).device
        with _quiet(device):
            import deepspeed

            self._deepspeed = deepspeed
            if device.type == "cpu":  # gloo serves; the shared-memory operator wants a compiler
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": micro_batch,
                    "gradient_accumulation_steps": accumulation,
                    "gradient_clipping": 0.0,
                    "zero_allow_untested_optimizer": True,
                    # By default it reserves buckets of 5e8 entries.
                    "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 2 * 10**7},
                    "bf16": {"enabled": half},
                    "steps_per_print": 10**9,
                },
            )
        if self.stage:
            self._adopt(config)

    def _adopt(self, config: Config) -> None:
        zero = self.engine.optimizer
        runs = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )
        names = [name for name, _ in self._optimizer.named_parameters()]
        found = dict(zip(names, runs, strict=True))
        arena = Arena.of_group(dist.group.WORLD)
        for name, run in found.items():
            info = self._infos[name]
            planned = planned_flat(info, config.parallel, arena.size)
            if not isinstance(planned, Flat) or run.numel() != planned.step:
                raise UsageError(
                    f"parameter '{name}': DeepSpeed {self._deepspeed.__version__} gives this rank "
                    f"{run.numel()} entries, the plan says {planned}; install the version in "
                    "constraints.txt"
                )
        self._optimizer.adopt(found, arena, {name: run.numel() for name, run in found.items()})

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of one micro-batch; DeepSpeed divides by the accumulation and the ranks."""
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # does nothing but count

    def step(self) -> None:
        """Step the optimizer; gradients are cleared."""
        self.engine.step()

    def weight(self, name: str) -> Tensor:
        """A whole weight in fp32, on every rank."""
        if self.stage == 0:
            return self._model.get_parameter(name).detach()
        return self._whole(name, dict(self._optimizer.named_parameters())[name])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Whole weights and whole optimizer state, on every rank."""
        weights = {name: self.weight(name) for name in self._infos}
        state = self._optimizer.state_tensors()
        return weights, {
            key: self._whole(_param(key), tensor) if self._flat(key, tensor) else tensor
            for key, tensor in state.items()
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take whole weights and state back into the runs and the model."""
        for name, param in self._model.named_parameters():
            if self.stage == 3:
                with self._deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    param.data.copy_(weights[name])
            else:
                param.data.copy_(weights[name])
        if self.stage:
            for name, run in self._optimizer.named_parameters():
                self._cut(name, run, weights[name])
        for key, tensor in self._optimizer.state_tensors().items():
            if self._flat(key, tensor):
                self._cut(_param(key), tensor, state[key])
            else:
                tensor.copy_(state[key])

    def _flat(self, key: str, tensor: Tensor) -> bool:
        """Whether a state tensor is a run, like the momentum; second moments of rows are whole."""
        return self.stage > 0 and tensor.dim() > 0 and not key.endswith(".second_moment")

    def _whole(self, name: str, run: Tensor) -> Tensor:
        info, layout = self._infos[name], self._optimizer.layouts[name]
        parts = [torch.empty_like(run) for _ in range(layout.ranks)]
        dist.all_gather(parts, run.detach())
        return torch.cat(parts)[: info.numel].view(info.shape)

    def _cut(self, name: str, run: Tensor, whole: Tensor) -> None:
        layout = self._optimizer.layouts[name]
        assert isinstance(layout, Flat)
        start, stop = layout.run(self._optimizer.arena.rank)
        run.detach()[: stop - start].copy_(whole.reshape(-1)[start:stop])


def _param(key: str) -> str:
    """Parameter of a state tensor's key."""
    return key.rsplit(".", 1)[0]


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """Import and initialise DeepSpeed without its talk, and without compiling anything on a CPU."""
    if device.type == "cpu":
        default("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
