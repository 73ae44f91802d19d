"""What every architecture offers the recipe: roles, units to shard, costs, and its initial draw."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.cache import Cache
from geon.models.loss import linear_cross_entropy
from geon.optim.modular import Network
from geon.optim.roles import ParamInfo, Role


@dataclass(frozen=True)
class ModelShape:
    """Sizes and options of a decoder; every architecture reads the same fields.

    Attributes:
        vocab_size: number of token ids.
        context: longest sequence, tokens.
        n_layer: blocks.
        n_head: attention heads; divides d_model.
        d_model: width.
        mlp_ratio: hidden width of the MLP over d_model.
        softcap: bound of the logits, in the architecture's form; 0 leaves them.
        fused_qkv: one projection for q, k and v, with its splits declared.
        zero_init_proj: start output projections and head at zero.
        rope_base: base of the rotary frequencies.
        tied: the embedding is the head as well, and enters the residual stream unnormalised.
        activation_scale: factor on the squared ReLU.
        gains: each hidden matrix is diag(rows) W diag(cols) with learnt rows and cols.
        residual: plain adds branches to the stream; scaled takes the mean of the stream and a
            branch, with a share of 1 / (2 n_layer) for the branch.
        norm: rms, or none: no norm anywhere, and products of queries and keys over head_dim.
        mup: maximal update parametrisation for AdamW: initial draw, rate and logit scales by role.
        base_width: width at which mup changes nothing.
    """

    vocab_size: int
    context: int
    n_layer: int
    n_head: int
    d_model: int
    mlp_ratio: int = 4
    softcap: float = 0.0
    fused_qkv: bool = False
    zero_init_proj: bool = False
    rope_base: float = 10000.0
    tied: bool = False
    activation_scale: float = 1.0
    gains: bool = False
    residual: str = "plain"
    norm: str = "rms"
    mup: bool = False
    base_width: int = 64

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context", "n_layer", "n_head", "d_model", "mlp_ratio")
        for field in (*sizes, "base_width"):
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field} must be positive, got {getattr(self, field)}")
        if self.d_model % self.n_head:
            raise UsageError(
                f"model.d_model {self.d_model} does not divide into model.n_head {self.n_head}"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"model.d_model / model.n_head = {self.head_dim}: rotary positions need it even"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def share(self) -> float | None:
        """Share of a branch in the stream after it; None where branches are added."""
        return 1.0 / (2 * self.n_layer) if self.residual == "scaled" else None

    @property
    def shrink(self) -> float:
        """What muP multiplies logits and the rates of hidden matrices by: base_width / d_model."""
        return self.base_width / self.d_model if self.mup else 1.0


class LanguageModel(nn.Module, ABC):
    """A causal language model: tokens (batch, time) -> logits (batch, time, vocab), or a loss."""

    arch: ClassVar[str]
    """Key in configs; FSDP2 renames the class, so this is what a checkpoint knows it by."""

    rational_cap: ClassVar[bool] = False
    """Whether the softcap c makes c z / sqrt(z^2 + c^2) of logits z, and not c tanh(z / c)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpoint_activations = False
        self.loss_chunks = 1

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
        return 6 * weights + 12 * s.n_layer * s.d_model * s.context

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


def normal(info: ParamInfo, std: float, generator: Generator) -> Tensor:
    """Gaussian of the parameter's shape."""
    draw = torch.randn(info.shape, generator=generator, device=generator.device)
    return draw.mul_(std)


def refuse_options_of_gpt(arch: str, shape: ModelShape) -> None:
    """Refuse what only `gpt` reads, for the other architectures.

    Raises:
        UsageError: names the option.
    """
    if shape.tied:
        raise UsageError(f"model.tied=true: {arch} is tied or untied as it is; choose model=gpt")
    if shape.activation_scale != 1.0:
        raise UsageError(
            f"model.activation_scale={shape.activation_scale}: {arch} has no such factor; choose "
            "model=gpt"
        )
    for word, default in (("residual", "plain"), ("norm", "rms")):
        if (value := getattr(shape, word)) != default:
            raise UsageError(f"model.{word}={value}: {arch} is as it is; choose model=gpt")
