"""DeepSpeed: its engine runs the model and the gradients, our optimizer the step.

DeepSpeed replaces the parameters of the optimizer that it is given: ZeRO flattens each param group
and keeps an fp32 run of it on each rank, stage 0 in bf16 keeps whole fp32 copies. So it is given
one that passes steps on, with one param group a parameter, and ours is made over what DeepSpeed
then holds: runs are a layout like any other (`Flat`), and matrices are exchanged as under FSDP2.
ZeRO calls `step()` once for each param group, so matrices travel one by one. DeepSpeed's own Muon
is not used: it picks weights by name, and takes embeddings along.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geon.configs.schema import Config, Layouts
from geon.engine.build import Routing, make_optimizer
from geon.errors import UsageError
from geon.launch.env import default
from geon.models import LanguageModel
from geon.optim import EntryRule, HybridOptimizer, Placement
from geon.optim.shard import Layout, Ranks
from geon.optim.storage import lay, whole


def check_deepspeed(config: Config, routing: Routing) -> None:
    """Refuse what a step of one parameter at a time cannot do.

    Raises:
        UsageError: names the keys.
    """
    if config.parallel.layout is not Layouts.deepspeed:
        return
    if config.parallel.compile:
        raise UsageError(
            "parallel.compile=true with parallel=deepspeed: its hooks gather and count inside of "
            "the model; set parallel.compile=null, or use parallel=fsdp"
        )
    if config.optim.record_pairs:
        raise UsageError(
            "optim.record_pairs with parallel=deepspeed: its gradients are not to be seen before "
            "a step; record with parallel=ddp or fsdp, which step alike"
        )
    if not config.parallel.zero:
        return
    entries = [name for name, rule in routing.rules.items() if isinstance(rule, EntryRule)]
    if config.optim.max_norm and entries:
        raise UsageError(
            f"optim.max_norm {config.optim.max_norm} with parallel=deepspeed: ZeRO steps one "
            f"parameter at a time, so the norm over all of {', '.join(entries)} is not known "
            "when they are stepped; set optim.max_norm=0 (matrices need no clipping), or use "
            "parallel=fsdp"
        )
    for name, route in routing.configs.items():
        if route.idle.value == "coast":
            raise UsageError(
                f"optim.{name}.idle=coast with parallel=deepspeed: ZeRO steps one parameter at a "
                "time, so those that wait would coast at every call; set idle=skip, or use "
                "parallel=fsdp"
            )
    if config.logger.geometry_every:
        raise UsageError(
            f"logger.geometry_every {config.logger.geometry_every} with parallel=deepspeed: ZeRO "
            "steps one parameter at a time, and readings would be of the first alone; set it to "
            "0, or use parallel=fsdp"
        )
    if config.optim.nonfinite.value == "skip":
        raise UsageError(
            "optim.nonfinite=skip with parallel=deepspeed: ZeRO steps one parameter at a time, so "
            "half of a step would be left out; set optim.nonfinite=raise, or use parallel=fsdp"
        )


class _PassOn(torch.optim.Optimizer):
    """What DeepSpeed is given: one param group a parameter. Steps go on to ours."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__([{"params": [p], "name": name} for name, p in params.items()], {"lr": 0.0})
        self.stepper: Callable[[Mapping[str, Tensor]], None] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step what DeepSpeed has put into the param groups."""
        if self.stepper is None:  # DeepSpeed's way to have state made; ours is made without
            return
        held = {group["name"]: p for group in self.param_groups for p in group["params"]}
        self.stepper(held)


class DeepSpeed:
    """A DeepSpeed engine around a model, and our optimizer over what it holds.

    Attributes:
        engine: what `deepspeed.initialize` returned; call it like the model.
        optimizer: steps the parameters, or DeepSpeed's fp32 runs of them.
    """

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        routing: Routing,
        micro_batch: int,
        accumulation: int,
        half: bool,
    ) -> None:
        """Initialise DeepSpeed on the process group that exists."""
        check_deepspeed(config, routing)
        self._zero, self._model = config.parallel.zero, model
        self._infos = {info.name: info for info in model.infos}
        params = dict(model.named_parameters())
        given = _PassOn(params)
        device = next(model.parameters()).device
        with _quiet(device):
            import deepspeed

            self._deepspeed = deepspeed
            if device.type == "cpu":  # gloo serves; the shared-memory operator wants a compiler
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=given,
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": micro_batch,
                    "gradient_accumulation_steps": accumulation,
                    "gradient_clipping": 0.0,
                    "zero_allow_untested_optimizer": True,
                    # By default it reserves buckets of 5e8 entries.
                    "zero_optimization": {"stage": self._zero, "reduce_bucket_size": 2 * 10**7},
                    "bf16": {"enabled": half},
                    "steps_per_print": 10**9,
                },
            )
        found = self._find_held(half)
        self._held: dict[str, Tensor] = dict(zip(params, found, strict=True)) if found else params
        self._copies = bool(found)
        self.optimizer: HybridOptimizer = make_optimizer(
            model, routing, config, held=self._held, placement=self._placement(config)
        )
        given.stepper = self._step

    def _find_held(self, half: bool) -> list[Tensor]:
        """DeepSpeed's fp32 runs or copies, in the order of the param groups; empty if it has none.

        Should DeepSpeed hold something else, the first step is refused.
        """
        optimizer: Any = self.engine.optimizer
        if not self._zero:
            return [one for group in optimizer.fp32_groups for one in group] if half else []
        if self._zero == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _placement(self, config: Config) -> Placement:
        """How what DeepSpeed holds lies, held against what was planned.

        Raises:
            UsageError: another version of DeepSpeed cuts otherwise.
        """
        from geon.engine.parallel import planned_flat

        group = dist.group.WORLD
        assert group is not None
        ranks, layouts = Ranks.of_group(group), dict[str, Layout]()
        for name, held in self._held.items():
            info = self._infos[name]
            layouts[name] = planned_flat(info, config.parallel, ranks.size)
            step = getattr(layouts[name], "step", info.numel)
            if held.numel() != step:
                raise UsageError(
                    f"parameter '{name}': DeepSpeed {self._deepspeed.__version__} gives this rank "
                    f"{held.numel()} entries, the plan says {layouts[name]}; install the version "
                    "in constraints.txt"
                )
        return Placement(ranks, layouts)

    def _step(self, held: Mapping[str, Tensor]) -> None:
        """Step what DeepSpeed holds, which must be what ours holds.

        Raises:
            UsageError: it holds something else: those would never move.
            FloatingPointError: a gradient that is not finite.
        """
        for name, tensor in held.items():
            if tensor is not self._held[name]:
                raise UsageError(
                    f"parameter '{name}': DeepSpeed {self._deepspeed.__version__} steps another "
                    "tensor than it held when the optimizer was made, so nothing would be "
                    "trained; install the version in constraints.txt, or use parallel=fsdp"
                )
        ready = {name for name, tensor in self._held.items() if tensor.grad is not None}
        if ready != set(held):
            raise UsageError(
                f"DeepSpeed {self._deepspeed.__version__} steps {', '.join(held)} while "
                f"{', '.join(sorted(ready)) or 'nothing'} has a gradient: install the version in "
                "constraints.txt, or use parallel=fsdp"
            )
        try:
            self.optimizer.step()
        except FloatingPointError as error:
            if not self._zero:
                raise
            raise FloatingPointError(
                f"{error}. Under ZeRO the parameters before {', '.join(held)} have been stepped: "
                "go on from the last checkpoint"
            ) from None

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
        return self._whole(name, self._held[name])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Whole weights and whole optimizer state, on every rank."""
        weights = {name: self.weight(name) for name in self._infos}
        state = self.optimizer.state_tensors()
        return weights, {
            key: self._whole(_param(key), tensor) if self._flat(key, tensor) else tensor
            for key, tensor in state.items()
        }

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take whole weights and state back into the runs and the model."""
        for name, param in self._model.named_parameters():
            if self._zero == 3:
                with self._deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    param.data.copy_(weights[name])
            else:
                param.data.copy_(weights[name])
        for name, held in self._held.items() if self._copies else ():
            self._cut(name, held, weights[name])
        for key, tensor in self.optimizer.state_tensors().items():
            if self._flat(key, tensor):
                self._cut(_param(key), tensor, state[key])
            else:
                tensor.copy_(state[key])

    def _flat(self, key: str, tensor: Tensor) -> bool:
        """Whether a state tensor is a run, like the momentum; row states are whole."""
        run = self._zero and tensor.shape == self._held[_param(key)].shape
        return bool(run) and not self._by_rows(key)

    def _by_rows(self, key: str) -> bool:
        rule = self.optimizer.rules[self._route(_param(key))]
        return key.rsplit(".", 1)[1] in getattr(rule, "row_states", ())

    def _route(self, name: str) -> str:
        return next(g["name"] for g in self.optimizer.param_groups if name in g["param_names"])

    def _whole(self, name: str, held: Tensor) -> Tensor:
        layout, ranks = self.optimizer.layouts[name], self.optimizer.ranks
        return whole(held, layout, ranks.group).view(self._infos[name].shape)

    @torch.no_grad()
    def _cut(self, name: str, held: Tensor, given: Tensor) -> None:
        lay(given, held, self.optimizer.layouts[name], self.optimizer.ranks.rank)


def _param(key: str) -> str:
    """Name of the parameter in the key of a state tensor."""
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
