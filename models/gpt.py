"""The speedrun-style GPT: gainless RMSNorm, QK-norm, RoPE, ReLU^2, untied head."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.models.base import LanguageModel, ModelShape, declare, normal
from geon.models.cache import BlockCache, Cache
from geon.models.described import attention, mlp, network, table
from geon.models.layers import (
    Projections,
    attend,
    block_plan,
    head_axes,
    joined,
    linear,
    lowered,
    relu_squared,
    rms_norm,
    rotary_table,
    rotate,
)
from geon.optim.modular import Bond, Network, Normalize, Rotate, Series, SquaredRelu, residual
from geon.optim.roles import ParamInfo, Role

EPS = 1e-6
"""Of rms_norm."""


def norm_of(shape: ModelShape) -> Callable[[Tensor], Tensor]:
    """RMSNorm without gains, or nothing."""
    return rms_norm if shape.norm == "rms" else _same


def _same(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Multi-head attention with rotary positions and RMS-normalised queries and keys.

    Without norms, products of queries and keys are over K instead of its root: they are as large
    as K where the two are aligned (Large et al., arXiv 2405.14813).
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.norm = norm_of(shape)
        self.scale = None if shape.norm == "rms" else 1.0 / shape.head_dim
        self.proj_in = Projections(shape.d_model, shape.fused_qkv, False, shape.gains)
        self.proj_out = linear(shape.d_model, shape.d_model, gains=shape.gains)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(x))
        q, k = self.norm(rotate(q, cos, sin)), self.norm(rotate(k, cos, sin))
        return self.proj_out((past.attend if past else attend)(q, k, v, self.scale))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each joined to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width = shape.mlp_ratio * shape.d_model
        self.norm, self.share = norm_of(shape), shape.share
        self.attention = Attention(shape)
        self.activation_scale = shape.activation_scale
        self.up = linear(shape.d_model, width, gains=shape.gains)
        self.down = linear(width, shape.d_model, gains=shape.gains)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = joined(x, self.attention(self.norm(x), cos, sin, past), self.share)
        inner = relu_squared(self.up(self.norm(x)), self.activation_scale)
        return joined(x, self.down(inner), self.share)


class GPT(LanguageModel):
    """Decoder whose embedding, hidden matrices and head are all it learns, unless it has gains.

    Tied, it has no head of its own, and does not normalise what the embedding gives.
    """

    arch = "gpt"

    def __init__(self, shape: ModelShape) -> None:
        super().__init__(shape)
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        if not shape.tied:
            self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        s, norm = self.shape, norm_of(self.shape)
        x = lowered(self.embed(tokens))
        x = x if s.tied else norm(x)
        time = cache.context if cache else tokens.shape[1]
        angles = rotary_table(time, s.head_dim, s.rope_base, tokens.device)
        cos, sin = cache.columns(angles, tokens.shape[1]) if cache else angles
        return norm(self.run_blocks(x, cos, sin, cache=cache))

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab)."""
        return F.linear(x, self.embed.weight) if self.shape.tied else self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (vocab, D): the embedding's, when tied."""
        return self.embed.weight if self.shape.tied else self.head.weight

    def roles(self) -> list[ParamInfo]:
        """Embedding, head, gains where it has them, and everything else a hidden matrix."""
        d, tied = self.shape.d_model, self.shape.tied
        return declare(
            self,
            {
                "embed.weight": Role.TIED if tied else Role.EMBEDDING,
                "head.weight": Role.HEAD,
                "weight": Role.HIDDEN,
                "rows": Role.GAIN,
                "cols": Role.GAIN,
            },
            {"qkv.weight": (d, d, d)},
            head_axes(self.shape.n_head),
        )

    def modular(self) -> Network:
        """Residual blocks of attention and MLP."""
        s = self.shape
        frequencies = tuple(s.rope_base ** (-2 * i / s.head_dim) for i in range(s.head_dim // 2))
        turn: tuple[Bond, ...] = (Rotate(frequencies),)
        scale = 1.0 / s.head_dim
        if s.norm == "rms":
            turn, scale = (*turn, Normalize("", s.head_dim, EPS, s.n_head)), s.head_dim**-0.5

        def norm(name: str) -> tuple[Bond, ...]:
            return (Normalize(name, s.d_model, EPS),) if s.norm == "rms" else ()

        blocks = []
        for i in range(s.n_layer):
            path = f"blocks.{i}"
            mix = attention(f"{path}.attention.", s, scale, turn)
            act = mlp(path, s, SquaredRelu(s.activation_scale))
            halves = (
                residual(Series((*norm(f"{path}.norm1"), mix), mix.name), s.share, f"{path}.1"),
                residual(Series((*norm(f"{path}.norm2"), act), act.name), s.share, f"{path}.2"),
            )
            blocks.append(Series(halves, path))
        first = () if s.tied else norm("norm_embed")
        name = "embed.weight" if s.tied else ""
        return network(table(s, s.tied), first, blocks, norm("norm"), s, name)

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """Embedding N(0, 1); matrices of variance 1/(3 d_in), as torch draws its Linear.

        A tied weight is drawn as a head. Under muP the head's variance is that of the base width.
        """
        if info.role is Role.GAIN:
            return torch.ones(info.shape, device=generator.device)
        ends_branch = info.name.endswith(("proj_out.weight", "down.weight", "head.weight"))
        if self.shape.zero_init_proj and ends_branch:
            return torch.zeros(info.shape, device=generator.device)
        heads = (Role.HEAD, Role.TIED)
        fan = info.shape[-1] * (self.shape.shrink if info.role in heads else 1.0)
        std = 1.0 if info.role is Role.EMBEDDING else 1.0 / math.sqrt(3 * fan)
        return normal(info, std, generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks; embedding and head stay with the root."""
        return list(self.blocks)

    def tp_plan(self) -> dict[str, Any]:
        """Heads and MLP neurons are split; embedding and head by tokens, logits gathered.

        A tied weight, which is read in two ways, is whole on every tensor rank.
        """
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        if self.shape.tied:
            return block_plan("attention.")
        return {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            **block_plan("attention."),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
