"""Llama (arXiv 2302.13971): RMSNorm with gains, RoPE, SwiGLU, grouped queries; and Qwen3."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.base import LanguageModel, as_linear, declare
from geon.models.cache import BlockCache, Cache
from geon.models.described import matrix, network, table
from geon.models.grouped import GroupedAttention
from geon.models.hf import HFMap
from geon.models.kept import FP32, Pass
from geon.models.layers import Norm, block_plan, ends_plan, lowered
from geon.models.rope import SCALINGS, slowed, turning_table
from geon.models.shapes import Shape
from geon.models.tensor import SummedGains
from geon.optim.modular import (
    Attention,
    Contraction,
    Gain,
    Join,
    Multiply,
    Network,
    Node,
    Normalize,
    Repeat,
    Rotate,
    Scale,
    Series,
    residual,
)
from geon.optim.roles import ParamInfo, Role


@dataclass(frozen=True)
class LlamaShape(Shape):
    """Options of llama.

    Attributes:
        tied: the embedding is the head as well.
        rope_base: base of the rotary frequencies.
        n_kv_head: heads of keys and values; divides n_head; 0 takes n_head.
        d_ff: width of the MLP; 0 takes 8/3 d_model, rounded up to a multiple of 32.
        d_head: width of a head; 0 takes d_model / n_head.
        qk_norm: RMSNorm of each head's queries and keys, with gains that all heads share.
        norm_eps: added to the mean square in every norm.
        rope_scaling: none, linear or llama3, by the four numbers below; see models/rope.py.
        rope_factor: how much longer the context becomes.
        rope_low: waves in the old context below which a frequency is divided by rope_factor.
        rope_high: waves above which it stays.
        rope_original: context before scaling, tokens.
    """

    arch = "llama"

    tied: bool = False
    rope_base: float = 10000.0
    n_kv_head: int = 0
    d_ff: int = 0
    d_head: int = 0
    qk_norm: bool = False
    norm_eps: float = 1e-5
    rope_scaling: str = "none"
    rope_factor: float = 8.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192

    def check(self) -> None:
        """Refuse sizes that make no model.

        Raises:
            UsageError: names the key.
        """
        for key in ("n_kv_head", "d_ff", "d_head"):
            if getattr(self, key) < 0:
                raise UsageError(f"model.options.{key}={getattr(self, key)}: it must be 0 or more")
        for key in ("norm_eps", "rope_factor", "rope_low", "rope_original"):
            if not getattr(self, key) > 0:
                raise UsageError(f"model.options.{key}={getattr(self, key)}: it must be above 0")
        if not self.rope_high > self.rope_low:
            raise UsageError(
                f"model.options.rope_high={self.rope_high}: it must be above rope_low "
                f"{self.rope_low}"
            )
        if self.rope_scaling not in SCALINGS:
            raise UsageError(
                f"model.options.rope_scaling={self.rope_scaling}: choose {', '.join(SCALINGS)}"
            )
        if self.n_head % self.kv_heads:
            raise UsageError(
                f"model.options.n_kv_head={self.n_kv_head}: it must divide model.n_head "
                f"{self.n_head}"
            )
        if not self.d_head:
            super().check()
        elif self.d_head % 2:
            raise UsageError(f"model.options.d_head={self.d_head}: rotary positions need it even")

    def check_tensor(self, ranks: int) -> None:
        """Heads of keys and values and the MLP's width must divide, besides.

        Raises:
            UsageError: names the key.
        """
        super().check_tensor(ranks)
        for key, size in (("n_kv_head", self.kv_heads), ("d_ff", self.mlp_width)):
            if size % ranks:
                raise UsageError(
                    f"model.options.{key} {size} does not divide over {ranks} tensor ranks "
                    "(parallel.tensor, or all ranks under parallel=tp)"
                )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.d_ff or -(-8 * self.d_model // 96) * 32

    def attention(self) -> GroupedAttention:
        """The attention of a block."""
        qk_eps = self.norm_eps if self.qk_norm else None
        return GroupedAttention(self.d_model, self.n_head, self.kv_heads, self.head_dim, qk_eps)

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Radians a token of the pairs of a head."""
        waves = self.rope_low, self.rope_high, self.rope_original
        found = (self.rope_base ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        return tuple(slowed(f, self.rope_scaling, self.rope_factor, *waves) for f in found)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        d, width = shape.d_model, shape.mlp_width
        self.norm1, self.norm2 = (Norm(d, shape.norm_eps) for _ in range(2))
        self.attention = shape.attention()
        self.gate, self.up = (nn.Linear(d, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, d, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attention(self.norm1(x), cos, sin, past)
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


ROLES = {
    "norm1.weight": Role.GAIN,
    "norm2.weight": Role.GAIN,
    "norm.weight": Role.GAIN,
    "q_norm.weight": Role.GAIN,
    "k_norm.weight": Role.GAIN,
    "head.weight": Role.HEAD,
    "weight": Role.HIDDEN,
}


class Llama(LanguageModel):
    """Decoder whose matrices have no biases, and whose norms have gains."""

    shape_type = LlamaShape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(self._block() for _ in range(shape.n_layer))
        self.norm = Norm(shape.d_model, shape.norm_eps)
        if not shape.tied:
            self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def _block(self) -> nn.Module:
        return Block(self.shape)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        x = lowered(self.embed(tokens))
        return self.norm(self.run_blocks(x, *self.angles(tokens, cache), cache=cache))

    def angles(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, ...]:
        """Rotary tables for tokens."""
        time = cache.context if cache else tokens.shape[1]
        angles = turning_table(time, self.shape.frequencies, tokens.device)
        return cache.columns(angles, tokens.shape[1]) if cache else angles

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab)."""
        return F.linear(x, self.embed.weight) if self.shape.tied else self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (vocab, D): the embedding's, when tied."""
        return self.embed.weight if self.shape.tied else self.head.weight

    def roles(self) -> list[ParamInfo]:
        """Embedding, head, gains, and everything else a hidden matrix."""
        return self.declared({})

    def declared(self, own: Mapping[str, Role]) -> list[ParamInfo]:
        """Roles of llama's parameters, and of those that a model has besides."""
        s = self.shape
        embedding = Role.TIED if s.tied else Role.EMBEDDING
        heads = {
            **{f"{part}.weight": (s.kv_heads, 0) for part in "kv"},
            "q.weight": (s.n_head, 0),
            "proj_out.weight": (s.n_head, 1),
        }
        return declare(self, {**ROLES, **own, "embed.weight": embedding}, {}, heads)

    def modular(self) -> Network:
        """Residual blocks of attention and SwiGLU.

        Raises:
            UsageError: QK-norm, whose gains are shared by heads: there is no atom of them.
        """
        s = self.shape
        if s.qk_norm:
            raise UsageError(
                "model.options.qk_norm=true: gains that heads share have no modular norm yet; set "
                "it false, or leave out optim.budget=modular, mode=certify and certify_every"
            )
        halves = []
        for i in range(s.n_layer):
            path = f"blocks.{i}"
            mix, mlp = self._attends(f"{path}.attention"), self._gated(path)
            first = Series((*self._normed(f"{path}.norm1"), mix), mix.name)
            second = Series((*self._normed(f"{path}.norm2"), mlp), mlp.name)
            pair = residual(first, name=f"{path}.1"), residual(second, name=f"{path}.2")
            halves.append(Series(pair, path))
        tied = "embed.weight" if s.tied else ""
        return network(table(s, s.tied), (), halves, self._normed("norm"), s, tied)

    def _normed(self, name: str) -> tuple[Node, ...]:
        s = self.shape
        return Normalize(name, s.d_model, s.norm_eps), Gain(f"{name}.weight", (s.d_model,))

    def _attends(self, path: str) -> Series:
        s = self.shape
        turn = Rotate(tuple(-f for f in s.frequencies))
        group = Repeat(s.head_dim, s.n_head // s.kv_heads)
        width, own = s.n_head * s.head_dim, s.kv_heads * s.head_dim
        sizes: Sequence[tuple[str, int, tuple[Node, ...]]] = (
            ("q", width, (turn,)),
            ("k", own, (turn, group)),
            ("v", own, (group,)),
        )
        read = []
        for part, d_out, bonds in sizes:
            layer = matrix(f"{path}.proj_in.{part}", s.d_model, d_out)
            read.append(Series((*layer.nodes, *bonds), layer.name))
        heads = Attention(s.n_head, s.head_dim, s.head_dim**-0.5)
        out = matrix(f"{path}.proj_out", width, s.d_model)
        return Series((Join(tuple(read), heads, f"{path}.heads"), out), path)

    def _gated(self, path: str) -> Series:
        s = self.shape
        gate = matrix(f"{path}.gate", s.d_model, s.mlp_width)
        gate = Series((*gate.nodes, Contraction("silu"), Scale(1.1)), gate.name)
        up = matrix(f"{path}.up", s.d_model, s.mlp_width)
        both = Join((gate, up), Multiply(), f"{path}.gated")
        return Series((both, matrix(f"{path}.down", s.mlp_width, s.d_model)), f"{path}.mlp")

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
        plan = block_plan("attention.", ["gate"])
        if self.shape.qk_norm:
            plan |= {f"blocks.*.attention.{name}": SummedGains() for name in ("q_norm", "k_norm")}
        return plan | ({} if self.shape.tied else ends_plan())

    @classmethod
    def hf_map(cls) -> HFMap:
        """Llama, or Qwen3 with qk_norm."""
        return HFMap(_kind, llama_config, KEYS, OUTSIDE, {**INSIDE, **_MLP})

    def attention_bytes(self, at: Pass) -> int:
        """Bytes a token of both norms and of attention."""
        s = self.shape
        heads, shared = s.n_head // at.tensor, s.kv_heads // at.tensor
        kept = 2 * at.norm(s.d_model, True) + at.heads(heads)
        if s.qk_norm:
            numbers = (heads + shared) * s.head_dim
            kept += numbers * (at.wide + FP32 * at.eager_cpu) + FP32 * (heads + shared)
        return kept + 2 * (heads + shared) * s.head_dim * at.size

    def block_bytes(self, at: Pass) -> int:
        """Norms, attention, and of SwiGLU both products, the gate's SiLU and what `down` reads."""
        inner = 4 * self.shape.mlp_width // at.tensor * at.size
        return at.tokens * (self.attention_bytes(at) + inner)

    def outer_bytes(self, at: Pass) -> int:
        """The norm before the head, and the head's input."""
        return at.tokens * at.norm(self.shape.d_model, True)

    @property
    def flow_width(self) -> int:
        """Of the gate, of what it multiplies, and of their product."""
        return 3 * self.shape.mlp_width


def _kind(shape: LlamaShape) -> tuple[str, str]:
    return ("Qwen3ForCausalLM", "qwen3") if shape.qk_norm else ("LlamaForCausalLM", "llama")


def llama_config(shape: LlamaShape) -> dict[str, Any]:
    """Fields that the configs of Llama's family share.

    Raises:
        UsageError: a softcap.
    """
    if shape.softcap:
        raise UsageError(
            f"model.softcap={shape.softcap}: transformers' {_kind(shape)[1]} has none; set "
            "model.softcap=0"
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_base}
    if shape.rope_scaling != "none":
        rope |= {"rope_type": shape.rope_scaling, "factor": shape.rope_factor}
    if shape.rope_scaling == "llama3":
        rope |= {"low_freq_factor": shape.rope_low, "high_freq_factor": shape.rope_high}
        rope |= {"original_max_position_embeddings": shape.rope_original}
    return {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
        "attention_bias": False,
        "tie_word_embeddings": shape.tied,
    }


KEYS = {
    **{"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layer"},
    **{"num_attention_heads": "n_head", "num_key_value_heads": "options.n_kv_head"},
    **{"intermediate_size": "options.d_ff", "head_dim": "options.d_head"},
    **{"rms_norm_eps": "options.norm_eps", "tie_word_embeddings": "tied"},
    "rope_parameters": "rope_base and model.options.rope_scaling",
}
OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INSIDE = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    **{f"attention.proj_in.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attention.proj_out": "self_attn.o_proj",
    **{f"attention.{name}": f"self_attn.{name}" for name in ("q_norm", "k_norm")},
}
_MLP = {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
