"""GPT-2 (Radford et al., 2019): LayerNorm, GELU, learned positions, tied head."""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.base import LanguageModel, declare, normal
from geon.models.cache import BlockCache, Cache
from geon.models.described import attention, mlp, network, table
from geon.models.hf import HFMap
from geon.models.kept import FP32, Pass
from geon.models.layers import LayerNorm, Projections, attend, block_plan, head_axes, lowered
from geon.models.shapes import DecoderShape, Shape
from geon.optim.modular import (
    Add,
    Bias,
    Embed,
    Gain,
    Gelu,
    Join,
    Network,
    Node,
    Normalize,
    Series,
    residual,
)
from geon.optim.roles import ParamInfo, Role


class GPT2Shape(DecoderShape):
    """Options of gpt2: those of every decoder."""

    arch = "gpt2"


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm, each added to the residual stream."""

    def __init__(self, shape: GPT2Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.head_dim = shape.head_dim
        self.norm1 = LayerNorm(d)
        self.proj_in = Projections(d, shape.fused_qkv, bias=True)
        self.proj_out = nn.Linear(d, d)
        self.norm2 = LayerNorm(d)
        self.up = nn.Linear(d, shape.mlp_ratio * d)
        self.down = nn.Linear(shape.mlp_ratio * d, d)

    def forward(self, x: Tensor, past: BlockCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(self.norm1(x)))
        x = x + self.proj_out((past.attend if past else attend)(q, k, v))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(LanguageModel):
    """Decoder with biases and gains, whose embedding is also its head."""

    shape_type = GPT2Shape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.context, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = LayerNorm(shape.d_model)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        time = tokens.shape[1] + (cache.time if cache else 0)
        if time > self.shape.context:
            raise UsageError(
                f"sequence of {time} tokens, but GPT-2 learned {self.shape.context} positions "
                "(model.context)"
            )
        places = torch.arange(time - tokens.shape[1], time, device=tokens.device)
        if cache is not None and cache.starts is not None:  # padding takes any position
            places = (places - cache.starts[:, None]).clamp(min=0)
        x = lowered(self.embed(tokens) + self.positions(places))
        return self.norm(self.run_blocks(x, cache=cache))

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab) by the embedding's own weight."""
        return F.linear(x, self.embed.weight)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the embedding (vocab, D)."""
        return self.embed.weight

    def roles(self) -> list[ParamInfo]:
        """Tied embedding, learned positions, hidden matrices, gains and biases."""
        d = self.shape.d_model
        norms = ("norm1", "norm2", "norm")
        return declare(
            self,
            {
                "embed.weight": Role.TIED,
                "positions.weight": Role.EMBEDDING,
                **{f"{norm}.weight": Role.GAIN for norm in norms},
                "bias": Role.BIAS,
                "weight": Role.HIDDEN,
            },
            {"qkv.weight": (d, d, d)},
            head_axes(self.shape.n_head),
        )

    def modular(self) -> Network:
        """Residual blocks of attention and MLP; LayerNorm is a centred RMSNorm, gains and bias."""
        s = self.shape
        d = s.d_model

        def norm(name: str) -> tuple[Node, ...]:
            gains, bias = Gain(f"{name}.weight", (d,)), Bias(f"{name}.bias", (d,))
            return Normalize(name, d, 1e-5, center=True), gains, bias

        blocks = []
        for i in range(s.n_layer):
            path = f"blocks.{i}"
            mix = attention(f"{path}.", s, s.head_dim**-0.5, (), bias=True)
            act = mlp(path, s, Gelu(), bias=True)
            halves = (
                residual(Series((*norm(f"{path}.norm1"), mix), f"{path}.mix"), name=f"{path}.1"),
                residual(Series((*norm(f"{path}.norm2"), act), act.name), name=f"{path}.2"),
            )
            blocks.append(Series(halves, path))
        positions = Embed("positions.weight", (s.context, d), positions=True)
        source = Join((table(s, True), positions), Add(), "embed")
        return network(source, (), blocks, norm("norm"), s, "embed.weight")

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """N(0, 0.02^2), the ends of branches over sqrt(2 n_layer); gains 1, biases 0.

        Under muP the variance of hidden matrices falls as 1/width.
        """
        if info.role in (Role.GAIN, Role.BIAS):
            return torch.full(
                info.shape, 1.0 if info.role is Role.GAIN else 0.0, device=generator.device
            )
        std = 0.02 * math.sqrt(self.rate_scale(info))
        if info.name.endswith(("proj_out.weight", "down.weight")):
            if self.shape.zero_init_proj:
                return torch.zeros(info.shape, device=generator.device)
            std /= math.sqrt(2 * self.shape.n_layer)
        return normal(info, std, generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks; the tied weight stays with the root, which reads it twice."""
        return list(self.blocks)

    def tp_plan(self) -> dict[str, Any]:
        """Heads and MLP neurons are split; the tied weight, read in two ways, and norms are not."""
        return block_plan()

    @classmethod
    def hf_map(cls) -> HFMap:
        """GPT-2, whose Conv1D stores (d_in, d_out), and q, k and v side by side."""
        return HFMap(_kind, _config, _KEYS, _OUTSIDE, _INSIDE, "transformer.h")

    def block_bytes(self, at: Pass) -> int:
        """LayerNorms keep input and output, a mean and a factor."""
        s, size = self.shape, at.size
        kept = 4 * s.d_model * size + 4 * FP32 + at.heads(s.n_head // at.tensor)
        kept += (4 * (s.d_model // at.tensor) + 2 * s.mlp_width // at.tensor) * size
        return at.tokens * kept

    def outer_bytes(self, at: Pass) -> int:
        """The last norm's input and output, and its two numbers."""
        return at.tokens * (2 * self.shape.d_model * at.size + 2 * FP32)


def _kind(shape: GPT2Shape) -> tuple[str, str]:
    return "GPT2LMHeadModel", "gpt2"


def _config(shape: GPT2Shape) -> dict[str, Any]:
    if shape.softcap:
        raise UsageError(
            f"model.softcap={shape.softcap}: GPT-2 of transformers has none; choose model=gpt"
        )
    return {
        "vocab_size": shape.vocab_size,
        "n_positions": shape.context,
        "n_embd": shape.d_model,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_inner": shape.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }


_KEYS = {
    **{"vocab_size": "vocab_size", "n_positions": "context", "n_embd": "d_model"},
    **{"n_layer": "n_layer", "n_head": "n_head", "n_inner": "mlp_ratio"},
}
_OUTSIDE = {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f"}
_INSIDE = {
    **{"norm1": "ln_1", "norm2": "ln_2"},
    **{f"proj_in.{part}": "attn.c_attn" for part in "qkv"},
    **{"proj_out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
}
