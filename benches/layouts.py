"""A GPT's hidden matrices in every layout, for benches.sharding: parameters, gradients, counts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine.parallel import Parallel, mesh_shape
from geon.launch.env import Env
from geon.models import GPT, ModelShape
from geon.optim import Group, HybridOptimizer, ParamInfo, Placement, Role, Rule, Sharding, Spectral
from geon.optim.shard import Flat, Layout, Ranks, holding
from geon.optim.step import local, view
from geon.optim.storage import whole

CONFIGS = {
    "ddp": ParallelConfig(Layouts.ddp),
    "fsdp": ParallelConfig(Layouts.fsdp),
    "hsdp": ParallelConfig(Layouts.hsdp, replicas=2),
    "tp": ParallelConfig(Layouts.tp),
    "fsdp_tp": ParallelConfig(Layouts.fsdp, tensor=2),
    "deepspeed_z1": ParallelConfig(Layouts.deepspeed, zero=1),
}
LR = 0.02


def make_model(layers: int, width: int) -> GPT:
    """On the meta device; heads of 16, so that any layout cuts whole heads."""
    shape = ModelShape(
        vocab_size=256, context=64, n_layer=layers, n_head=width // 16, d_model=width
    )
    with torch.device("meta"):
        return GPT(shape)


def draw(info: ParamInfo, *words: int) -> Tensor:
    """Noise and a strong part of low rank: singular values over two decades, as momenta have."""
    seed = sum(ord(c) * 31**i for i, c in enumerate(info.name)) + 7919 * sum(words)
    generator = torch.Generator().manual_seed(seed % 2**31)
    rows, cols = info.matrix_shape
    rank = max(1, min(rows, cols) // 8)
    left = torch.randn(rows, rank, generator=generator) * torch.logspace(1, 0, rank)
    strong = left @ torch.randn(rank, cols, generator=generator)
    return strong + torch.randn(rows, cols, generator=generator)


class Bench:
    """The hidden matrices of a GPT, placed, with an optimizer over them.

    Attributes:
        optimizer: ours, or a peer's over the same DTensors.
        params: by name, in the order of the model.
    """

    def __init__(
        self, layout: str, model: GPT, rule: Rule, ranks: int, device: torch.device
    ) -> None:
        self.layout, self.rule, self.ranks, self.device = layout, rule, ranks, device
        config = CONFIGS[layout]
        self.infos = {i.name: i for i in model.infos if i.role is Role.HIDDEN}
        sizes = mesh_shape(config, ranks)
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        env = Env(dist.get_rank(), ranks, 0, True)
        self.parallel = Parallel(config, env, device, mesh)
        self.parallel.place(model)
        self.params = {n: p for n, p in model.named_parameters() if n in self.infos}
        self.optimizer: Any = None
        self._flat: dict[str, Tensor] = dict(self.params)
        seen = Ranks.of(self.params.items(), mesh)
        self._rank = seen.rank
        self._layouts: dict[str, Layout] = {n: seen.layout(n, p) for n, p in self.params.items()}

    def make(self, sharding: Sharding) -> HybridOptimizer:
        """Our optimizer, and weights at their start."""
        placement, mesh = None, self.parallel.mesh
        if self.layout.startswith("deepspeed"):
            placement, mesh = self._flatten(), None
            sharding = replace(sharding, by_parameter=True)
        self.fill(self._flat, {n: self.start(n) for n in self.infos})
        pairs: list[Any] = [(self.infos[n], p) for n, p in self._flat.items()]
        group = Group("hidden", self.rule, LR, pairs)
        # Not to look at gradients, which would send a number more than the exchange does.
        self.optimizer = HybridOptimizer(
            [group], sharding, mesh, nonfinite="ignore", placement=placement
        )
        return self.optimizer

    def _flatten(self) -> Placement:
        """Runs of each parameter, as DeepSpeed's stage 1 pads them."""
        world = dist.group.WORLD
        assert world is not None
        steps = {n: -(-i.numel // (2 * self.ranks)) * 2 for n, i in self.infos.items()}
        self._flat = {
            n: nn.Parameter(torch.zeros(step, device=self.device)) for n, step in steps.items()
        }
        self._layouts = {
            n: Flat(i.matrix_shape, self.ranks, steps[n]) for n, i in self.infos.items()
        }
        return Placement(Ranks.of_group(world), self._layouts)

    def start(self, name: str) -> Tensor:
        """Whole weight at the start."""
        seed = sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
        shape = self.infos[name].matrix_shape
        return Spectral().init(shape, torch.Generator().manual_seed(seed)).to(self.device)

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor], wholes: Mapping[str, Tensor]) -> None:
        """Write this rank's part of whole matrices."""
        for name, target in targets.items():
            flat = local(target).detach().view(-1)
            layout, rank = self._layouts[name], self._rank
            for piece in layout.pieces(rank):
                view(flat, piece).copy_(wholes[name][piece.region.slices])

    def set_grads(self, wholes: Mapping[str, Tensor]) -> None:
        """Set gradients."""
        for param in self._flat.values():
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = {n: p.grad for n, p in self._flat.items() if p.grad is not None}
        self.fill(grads, wholes)

    def step(self) -> None:
        """One step; as DeepSpeed does it, parameter by parameter."""
        if not self.layout.startswith("deepspeed"):
            self.optimizer.step()
            return
        grads = {name: param.grad for name, param in self._flat.items()}
        for param in self._flat.values():
            param.grad = None
        for name, param in self._flat.items():
            param.grad = grads[name]
            self.optimizer.step()
            param.grad = None
        for name, param in self._flat.items():
            param.grad = grads[name]

    def locals(self) -> list[Tensor]:
        """Copies of this rank's weights."""
        return [local(p).detach().clone() for p in self._flat.values()]

    def descents(self, before: Sequence[Tensor]) -> Tensor:
        """<gradient, step> of each matrix, this rank's part: to be summed over ranks."""
        parts = []
        for (name, param), old in zip(self._flat.items(), before, strict=True):
            layout, rank = self._layouts[name], self._rank
            copies = holding(layout).shares(rank)
            step = old.double() - local(param).detach().double()
            assert param.grad is not None
            parts.append((local(param.grad).double() * step).sum() / copies)
        return torch.stack(parts)

    def whole(self, name: str) -> Tensor:
        """A whole weight; every rank must call."""
        found = whole(self._flat[name], self._layouts[name], dist.group.WORLD)
        return found.view(self.infos[name].shape)


class Counter(TorchDispatchMode):
    """Counts collectives and the bytes that this rank sends, where PyTorch hands them over.

    A ring moves (P-1)/P of an all-reduce twice and sends own parts P-1 times in an all-gather.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let DTensors unfold into their local operations; count what communicates."""
        from torch.distributed.tensor import DTensor

        if any(t == DTensor for t in types):
            return NotImplemented
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and "wait" not in name:
            self._take(name, args)
        return func(*args, **(kwargs or {}))

    def _take(self, name: str, args: Any) -> None:
        ranks, own = dist.get_world_size(), dist.get_rank()
        if "alltoall_base" in name:
            sizes = args[4]
            self.bytes += (sum(sizes) - sizes[own]) * args[1].element_size()
        elif "all_reduce" in name or "allreduce" in name:
            self.bytes += round(2 * (ranks - 1) / ranks * _bytes(args[0]))
        elif "all_gather" in name or "allgather" in name:
            sent = args[1] if "base" in name else args[0]
            self.bytes += (ranks - 1) * _bytes(sent)
        elif "reduce_scatter" in name or "all_to_all" in name:
            self.bytes += round((ranks - 1) / ranks * _bytes(args[0]))
        else:
            return
        self.collectives += 1


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(t) for t in tensors)


@contextmanager
def counted() -> Iterator[Counter]:
    """Count inside."""
    counter = Counter()
    with counter:
        yield counter
