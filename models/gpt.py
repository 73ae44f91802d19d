"""The speedrun-style GPT: gainless RMSNorm, QK-norm, RoPE, ReLU^2, untied head."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.base import LanguageModel, as_linear, declare
from geon.models.cache import BlockCache, Cache
from geon.models.described import attention, mlp, network, table
from geon.models.hf import HFMap
from geon.models.kept import FP32, Pass
from geon.models.layers import (
    Projections,
    attend,
    block_plan,
    ends_plan,
    head_axes,
    joined,
    linear,
    lowered,
    relu_squared,
    rms_norm,
    rotary_table,
    rotate,
)
from geon.models.shapes import DecoderShape, Shape
from geon.optim.modular import Bond, Network, Normalize, Rotate, Series, SquaredRelu, residual
from geon.optim.roles import ParamInfo, Role

EPS = 1e-6
"""Of rms_norm."""


@dataclass(frozen=True)
class GPTShape(DecoderShape):
    """Options of gpt.

    Attributes:
        rope_base: base of the rotary frequencies.
        tied: the embedding is the head as well, and enters the residual stream unnormalised.
        activation_scale: factor on the squared ReLU.
        gains: each hidden matrix is diag(rows) W diag(cols) with learnt rows and cols.
        residual: plain adds branches to the stream; scaled takes the mean of the stream and a
            branch, with a share of 1 / (2 n_layer) for the branch.
        norm: rms, or none: no norm anywhere, and products of queries and keys over head_dim.
    """

    arch = "gpt"

    rope_base: float = 10000.0
    tied: bool = False
    activation_scale: float = 1.0
    gains: bool = False
    residual: str = "plain"
    norm: str = "rms"

    def check_tensor(self, ranks: int) -> None:
        """Refuse gains, besides.

        Raises:
            UsageError: names the key.
        """
        if self.gains:
            raise UsageError(
                f"model.gains=true with {ranks} tensor ranks: torch's styles cut every vector of a "
                "layer by its outputs, but `cols` belongs to its inputs; set model.gains=false"
            )
        super().check_tensor(ranks)

    @property
    def share(self) -> float | None:
        """Share of a branch in the stream after it; None where branches are added."""
        return 1.0 / (2 * self.n_layer) if self.residual == "scaled" else None

    @property
    def folded(self) -> "GPTShape":
        """Without gains and factors; muP's stays where logits alone read no weight (tied)."""
        return replace(self, gains=False, activation_scale=1.0, mup=self.mup and self.tied)


def norm_of(shape: GPTShape) -> Callable[[Tensor], Tensor]:
    """RMSNorm without gains, or nothing."""
    return rms_norm if shape.norm == "rms" else _same


def _same(x: Tensor) -> Tensor:
    return x


class Attention(nn.Module):
    """Multi-head attention with rotary positions and RMS-normalised queries and keys.

    Without norms, products of queries and keys are over K instead of its root: they are as large
    as K where the two are aligned (Large et al., arXiv 2405.14813).
    """

    def __init__(self, shape: GPTShape) -> None:
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

    def __init__(self, shape: GPTShape) -> None:
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

    shape_type = GPTShape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
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
            mix = attention(f"{path}.attention.", s, scale, turn, gains=s.gains)
            act = mlp(path, s, SquaredRelu(s.activation_scale), gains=s.gains)
            halves = (
                residual(Series((*norm(f"{path}.norm1"), mix), mix.name), s.share, f"{path}.1"),
                residual(Series((*norm(f"{path}.norm2"), act), act.name), s.share, f"{path}.2"),
            )
            blocks.append(Series(halves, path))
        first = () if s.tied else norm("norm_embed")
        name = "embed.weight" if s.tied else ""
        return network(table(s, s.tied), first, blocks, norm("norm"), s, name)

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """See `as_linear`."""
        return as_linear(info, self.shape, generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks; embedding and head stay with the root."""
        return list(self.blocks)

    def tp_plan(self) -> dict[str, Any]:
        """Heads and MLP neurons are split; embedding and head by tokens, logits gathered.

        A tied weight, which is read in two ways, is whole on every tensor rank.
        """
        return block_plan("attention.") | ({} if self.shape.tied else ends_plan())

    @classmethod
    def hf_map(cls) -> HFMap:
        """NanoChat."""
        return HFMap(_kind, _config, _KEYS, _OUTSIDE, _INSIDE)

    def block_bytes(self, at: Pass) -> int:
        """See `decoder_bytes`."""
        return decoder_bytes(self.shape, at, self.shape.norm == "rms", fused=True)

    def outer_bytes(self, at: Pass) -> int:
        """Norms of the embedding and before the head."""
        d = self.shape.d_model
        if self.shape.norm == "none":
            return at.tokens * d * at.size
        return at.tokens * (2 * (d * at.wide + FP32) + d * at.size)


def decoder_bytes(
    s: DecoderShape, at: Pass, normed: bool, gains: bool = False, fused: bool = False
) -> int:
    """Bytes of a block with QK-norm and two matrices in its MLP.

    normed: whether there are norms. fused: whether a fused product stays alive behind those of q
    and k, in any arithmetic.
    """
    d, own, heads = s.d_model, s.d_model // at.tensor, s.n_head // at.tensor
    # What the products of q, k, v and of the MLP read; q, k, v and what attention gives.
    kept = 2 * at.norm(d, gains) if normed else 2 * d * at.size
    kept += (4 * own + 2 * s.mlp_width // at.tensor) * at.size + at.heads(heads)
    if normed:  # q and k go through norms of their own
        kept += 2 * own * at.wide + 2 * FP32 * heads
        # v keeps the fused product alive, and those norms' inputs where they are parts of it
        if s.fused_qkv and not at.composed and (fused or at.wide > at.size):
            kept += 2 * own * at.size
    return at.tokens * kept


def _kind(shape: GPTShape) -> tuple[str, str]:
    return "NanoChatForCausalLM", "nanochat"


def _config(shape: GPTShape) -> dict[str, Any]:
    for word, default in (("norm", "rms"), ("residual", "plain")):
        if (value := getattr(shape, word)) != default:
            raise UsageError(
                f"model.{word}={value}: NanoChat of transformers has model.{word}={default} alone"
            )
    if shape.tied:
        raise UsageError(
            "model.tied=true: NanoChat of transformers normalises what the embedding gives, and a "
            "tied gpt does not; it goes with model.tied=false alone"
        )
    return {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head,
        "hidden_act": "relu2",
        "rms_norm_eps": EPS,
        "final_logit_softcapping": shape.softcap or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


_KEYS = {
    **{"vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "mlp_ratio"},
    **{"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    **{"num_key_value_heads": "n_head", "final_logit_softcapping": "softcap"},
    "rope_parameters": "rope_base",
}
_OUTSIDE = {"embed": "model.embed_tokens", "head": "lm_head"}
_INSIDE = {
    **{f"attention.proj_in.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attention.proj_out": "self_attn.o_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
