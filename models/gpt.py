"""The speedrun-style GPT: gainless RMSNorm, QK-norm, RoPE, ReLU^2, untied head."""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.models.base import LanguageModel, ModelShape, declare, normal
from geon.models.layers import (
    Projections,
    attend,
    block_plan,
    head_axes,
    linear,
    lowered,
    relu_squared,
    rms_norm,
    rotary_table,
    rotate,
)
from geon.optim.roles import ParamInfo, Role


class Attention(nn.Module):
    """Multi-head attention with rotary positions and RMS-normalised queries and keys."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.proj_in = Projections(shape.d_model, shape.fused_qkv, False, shape.gains)
        self.proj_out = linear(shape.d_model, shape.d_model, gains=shape.gains)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(x))
        q, k = rms_norm(rotate(q, cos, sin)), rms_norm(rotate(k, cos, sin))
        return self.proj_out(attend(q, k, v))


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width = shape.mlp_ratio * shape.d_model
        self.attention = Attention(shape)
        self.activation_scale = shape.activation_scale
        self.up = linear(shape.d_model, width, gains=shape.gains)
        self.down = linear(width, shape.d_model, gains=shape.gains)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(rms_norm(x), cos, sin)
        return x + self.down(relu_squared(self.up(rms_norm(x)), self.activation_scale))


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

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        s = self.shape
        x = lowered(self.embed(tokens))
        x = x if s.tied else rms_norm(x)
        cos, sin = rotary_table(tokens.shape[1], s.head_dim, s.rope_base, tokens.device)
        for block in self.blocks:
            x = self.run_block(block, x, cos, sin)
        return rms_norm(x)

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
