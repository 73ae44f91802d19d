"""What every architecture offers the recipe: roles, units to shard, costs, and its initial draw."""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.models.cache import Cache
from geon.models.kept import Pass
from geon.models.loss import linear_cross_entropy
from geon.models.shapes import Shape
from geon.optim.modular import Network
from geon.optim.roles import ParamInfo, Role

if TYPE_CHECKING:
    from geon.models.hf import HFMap


class LanguageModel(nn.Module, ABC):
    """A causal language model: tokens (batch, time) -> logits (batch, time, vocab), or a loss."""

    shape_type: ClassVar[type[Shape]]
    """Its sizes and options, whose `arch` is its name."""

    rational_cap: ClassVar[bool] = False
    """Whether the softcap c makes c z / sqrt(z^2 + c^2) of logits z, and not c tanh(z / c)."""

    def __init__(self, shape: Shape) -> None:
        """shape: of this architecture, or of another whose options this one has not are unset."""
        super().__init__()
        fits = isinstance(shape, self.shape_type)
        self.shape: Any = shape if fits else self.shape_type.of(asdict(shape))
        self.checkpoint_activations = False
        self.loss_chunks = 1

    @classmethod
    def hf_map(cls) -> "HFMap | None":
        """How transformers stores it (models/hf.py); None where it has no such architecture."""
        return None

    @property
    def arch(self) -> str:
        """Key in configs; FSDP2 renames the class, so this is what a checkpoint knows it by."""
        return self.shape.arch

    @abstractmethod
    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Activations (batch, time, d) that the head reads.

        cache: of the tokens before these, which it then holds too; for inference on one process.
        """

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """(batch, time, d) times the head: (batch, time, vocab)."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The weight (vocab, d) that `project` multiplies by."""

    @property
    def head_bias(self) -> Tensor | None:
        """The bias (vocab,) that `project` adds, where there is one."""
        return None

    @abstractmethod
    def roles(self) -> list[ParamInfo]:
        """One ParamInfo for each parameter, in the order of `named_parameters()`."""

    @abstractmethod
    def modular(self) -> Network:
        """The model as a tree of modules: its masses, sensitivities and bounds (optim/modular)."""

    @abstractmethod
    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """Draw the initial value of one whole parameter, on the generator's device."""

    @abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """Modules that FSDP2 gathers one at a time; what is left belongs to the root."""

    @abstractmethod
    def tp_plan(self) -> dict[str, Any]:
        """Tensor parallelism: pattern of module names -> style (torch.distributed.tensor.parallel).

        Modules that it leaves out are the same on every tensor rank.
        """

    @abstractmethod
    def block_bytes(self, at: Pass) -> int:
        """Bytes that a block keeps for the backward pass, weights apart."""

    @abstractmethod
    def outer_bytes(self, at: Pass) -> int:
        """Bytes kept outside of the blocks: what outer norms keep, and the head's input."""

    @property
    def flow_width(self) -> int:
        """Numbers a token whose gradients stand beside each other in an MLP's backward pass."""
        return self.shape.mlp_width

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets (batch, time) the mean cross-entropy in nats."""
        x = self.hidden(tokens)
        return self.unembed(x) if targets is None else self.loss(x, targets)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits (batch, time, vocab) in fp32, softcapped when asked."""
        logits = self.project(x).float() * self.shape.shrink
        cap = self.shape.softcap
        if cap and self.rational_cap:
            return cap * logits * (logits.square() + cap**2).rsqrt()
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats from what the head reads."""
        weight = self.head_weight
        if hasattr(weight, "placements"):  # tensor parallel: `project` gathers the logits
            return F.cross_entropy(self.unembed(x).flatten(0, 1), targets.flatten())
        shape = self.shape
        return linear_cross_entropy(
            x,
            weight,
            targets,
            shape.shrink,
            shape.softcap,
            self.loss_chunks,
            self.head_bias,
            self.rational_cap,
        )

    @cached_property
    def infos(self) -> list[ParamInfo]:
        """`roles()` as first asked for: some frameworks empty the parameters later."""
        return self.roles()

    def rate_scale(self, info: ParamInfo) -> float:
        """What an AdamW rate is multiplied by for a parameter.

        Under muP an entry of a hidden matrix moves by 1/width a step, so that its sums over the
        width stay alike; embedding, head and vectors keep the rate (Yang et al., Tensor Programs
        V, arXiv 2203.03466, table 8).
        """
        return self.shape.shrink if info.role is Role.HIDDEN else 1.0

    def parameter_count(self) -> int:
        """Number of weights, a tied one counted once."""
        return sum(info.numel for info in self.infos)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one token at full context.

        6 for each weight that multiplies activations, and 12 n_layer d_model context for the
        attention products, without the saving of causality (PaLM, arXiv 2204.02311, appendix B).
        """
        multiplied = {Role.HIDDEN, Role.HEAD, Role.TIED}
        weights = sum(info.numel for info in self.infos if info.role in multiplied)
        s = self.shape
        return 6 * weights + 12 * s.n_layer * s.n_head * s.head_dim * s.context

    def run_blocks(self, x: Tensor, *args: Tensor, cache: Cache | None = None) -> Tensor:
        """Apply the blocks in turn. args: what each reads besides."""
        for i, block in enumerate(self.shard_units()):
            x = (
                self.run_block(block, x, *args)
                if cache is None
                else block(x, *args, cache.blocks[i])
            )
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def run_block(self, block: nn.Module, *args: Tensor) -> Tensor:
        """Apply a block, keeping only its input for the backward pass when asked to."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def declare(
    model: nn.Module,
    roles: dict[str, Role],
    splits: dict[str, tuple[int, ...]],
    heads: dict[str, tuple[int, int]],
) -> list[ParamInfo]:
    """Build the ParamInfo list from the last two parts of each name.

    roles maps "module.leaf" endings such as "embed.weight" or a bare leaf such as "bias";
    the longer ending wins. splits maps the same endings to fused rows, heads to (count, axis).
    """
    infos = []
    for name, param in model.named_parameters():
        ending = ".".join(name.split(".")[-2:])
        leaf = name.rsplit(".", 1)[-1]
        role = roles.get(ending, roles.get(leaf))
        if role is None:
            raise ValueError(f"{type(model).__name__} declares no role for its parameter '{name}'")
        shape, fused = tuple(param.shape), splits.get(ending, ())
        infos.append(ParamInfo(name, shape, role, fused, *heads.get(ending, ())))
    return infos


def as_linear(info: ParamInfo, shape: Shape, generator: Generator) -> Tensor:
    """Embedding N(0, 1); matrices of variance 1/(3 d_in), as torch draws its Linear; gains 1.

    A tied weight is drawn as a head. Under muP the head's variance is that of the base width.
    """
    if info.role is Role.GAIN:
        return torch.ones(info.shape, device=generator.device)
    ends = ("proj_out.weight", "down.weight", "experts.down", "head.weight")
    if shape.zero_init_proj and info.name.endswith(ends):
        return torch.zeros(info.shape, device=generator.device)
    heads = (Role.HEAD, Role.TIED)
    fan = info.shape[-1] * (shape.shrink if info.role in heads else 1.0)
    std = 1.0 if info.role is Role.EMBEDDING else 1.0 / math.sqrt(3 * fan)
    return normal(info, std, generator)


def normal(info: ParamInfo, std: float, generator: Generator) -> Tensor:
    """Gaussian of the parameter's shape."""
    draw = torch.randn(info.shape, generator=generator, device=generator.device)
    return draw.mul_(std)
