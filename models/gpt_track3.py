"""The fixed architecture of track 3 of the NanoGPT speedrun (modded-nanogpt, 2026)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from geon.errors import UsageError
from geon.models.base import LanguageModel, declare, normal
from geon.models.cache import BlockCache, Cache
from geon.models.described import attention, mlp, network, table
from geon.models.gpt import decoder_bytes
from geon.models.kept import FP32, Pass
from geon.models.layers import (
    Projections,
    attend,
    block_plan,
    ends_plan,
    head_axes,
    lowered,
    relu_squared,
    rms_norm,
    rotate,
)
from geon.models.rope import Tables, made_once
from geon.models.shapes import DecoderShape, Shape
from geon.optim.modular import (
    Gain,
    Network,
    Node,
    Normalize,
    Rotate,
    Series,
    SquaredRelu,
    residual,
)
from geon.optim.roles import ParamInfo, Role

ATTENTION_SCALE = 0.12
ROPE_BASE = 1024.0
EPS = 2.0**-23
"""What torch's RMSNorm takes when none is given: its sums are in fp32 for bf16 too."""
VARIANCE = 0.33
"""Variance of a drawn matrix times d_in."""


@made_once
def truncated_table(time: int, head_dim: int, device: torch.device) -> Tables:
    """Cosines and sines (T, K/2) in fp32, of which the second half of the pairs does not turn.

    Frequencies of the first half fall evenly in their logarithm from 1 to 1 / ROPE_BASE.
    """
    turning = torch.linspace(0, 1, head_dim // 4, device=device)
    frequency = torch.zeros(head_dim // 2, device=device)
    frequency[: head_dim // 4] = (1 / ROPE_BASE) ** turning
    angle = torch.arange(time, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


class Track3Shape(DecoderShape):
    """Options of gpt_track3: those of every decoder."""

    arch = "gpt_track3"

    def check(self) -> None:
        """Refuse heads whose pairs do not halve, besides.

        Raises:
            UsageError: names the keys.
        """
        super().check()
        if self.head_dim % 4:
            raise UsageError(
                f"model.d_model / model.n_head = {self.head_dim}: gpt_track3 turns half of the "
                "pairs of a head, so it must divide by 4"
            )


class GainNorm(nn.Module):
    """RMSNorm with gains, in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.gains, EPS)


class Block(nn.Module):
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: Track3Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.head_dim = shape.head_dim
        self.norm1 = GainNorm(d)
        self.proj_in = Projections(d, shape.fused_qkv, bias=True)
        self.proj_out = nn.Linear(d, d)
        self.norm2 = GainNorm(d)
        self.up = nn.Linear(d, shape.mlp_ratio * d)
        self.down = nn.Linear(shape.mlp_ratio * d, d)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(self.norm1(x)))
        # Turned in fp32: under autocast the angles of late positions would lose their digits.
        q, k = (rotate(rms_norm(t, eps=EPS).float(), cos, sin).to(t.dtype) for t in (q, k))
        x = x + self.proj_out((past.attend if past else attend)(q, k, v, ATTENTION_SCALE))
        return x + self.down(relu_squared(self.up(self.norm2(x))))


class GPTTrack3(LanguageModel):
    """Decoder with biases on every Linear, gains on every norm, and an untied head.

    Source: records/track_3_optimization of github.com/KellerJordan/modded-nanogpt, whose rules fix
    it; written from its description. The track's size is model/size=track3.
    """

    shape_type = Track3Shape
    rational_cap = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.norm_embed = GainNorm(shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = GainNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, shape.vocab_size)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        x = self.norm_embed(lowered(self.embed(tokens)))
        time = cache.context if cache else tokens.shape[1]
        angles = truncated_table(time, self.shape.head_dim, tokens.device)
        cos, sin = cache.columns(angles, tokens.shape[1]) if cache else angles
        return self.norm(self.run_blocks(x, cos, sin, cache=cache))

    def project(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, vocab)."""
        return self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (vocab, D)."""
        return self.head.weight

    @property
    def head_bias(self) -> Tensor:
        """Bias of the head (vocab,)."""
        return self.head.bias

    def roles(self) -> list[ParamInfo]:
        """Embedding, head, gains, biases, and everything else a hidden matrix."""
        d = self.shape.d_model
        return declare(
            self,
            {
                "embed.weight": Role.EMBEDDING,
                "head.weight": Role.HEAD,
                "weight": Role.HIDDEN,
                "gains": Role.GAIN,
                "bias": Role.BIAS,
            },
            {"qkv.weight": (d, d, d)},
            head_axes(self.shape.n_head),
        )

    def modular(self) -> Network:
        """Residual blocks of attention and MLP, behind norms with gains."""
        s = self.shape
        turning = s.head_dim // 4
        powers = torch.linspace(0, 1, turning, device="cpu").tolist()
        still = (0.0,) * (s.head_dim // 2 - turning)
        rotary = Rotate((*((1 / ROPE_BASE) ** power for power in powers), *still))
        turn = (Normalize("", s.head_dim, EPS, s.n_head), rotary)

        def norm(name: str) -> tuple[Node, ...]:
            return Normalize(name, s.d_model, EPS), Gain(f"{name}.gains", (s.d_model,))

        blocks = []
        for i in range(s.n_layer):
            path = f"blocks.{i}"
            mix = attention(f"{path}.", s, ATTENTION_SCALE, turn, bias=True)
            act = mlp(path, s, SquaredRelu(), bias=True)
            halves = (
                residual(Series((*norm(f"{path}.norm1"), mix), f"{path}.mix"), name=f"{path}.1"),
                residual(Series((*norm(f"{path}.norm2"), act), act.name), name=f"{path}.2"),
            )
            blocks.append(Series(halves, path))
        first, last = norm("norm_embed"), norm("norm")
        embed = table(s, False)
        return network(embed, first, blocks, last, s, bias=True, rational=True)

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """Embedding N(0, 1); matrices of variance 0.33 / d_in; gains 1, biases 0.

        Under muP the head's variance is that of the base width.
        """
        if info.role in (Role.GAIN, Role.BIAS):
            return torch.full(
                info.shape, 1.0 if info.role is Role.GAIN else 0.0, device=generator.device
            )
        ends = info.name.endswith(("proj_out.weight", "down.weight", "head.weight"))
        if self.shape.zero_init_proj and ends:
            return torch.zeros(info.shape, device=generator.device)
        fan = info.shape[-1] * (self.shape.shrink if info.role is Role.HEAD else 1.0)
        std = 1.0 if info.role is Role.EMBEDDING else math.sqrt(VARIANCE / fan)
        return normal(info, std, generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks; embedding and head stay with the root."""
        return list(self.blocks)

    def tp_plan(self) -> dict[str, Any]:
        """Heads and MLP neurons are split; embedding and head by tokens, logits gathered."""
        return block_plan() | ends_plan()

    def block_bytes(self, at: Pass) -> int:
        """See `decoder_bytes`."""
        return decoder_bytes(self.shape, at, True, gains=True)

    def outer_bytes(self, at: Pass) -> int:
        """Norms of the embedding and before the head."""
        s, gained = self.shape, FP32 * at.eager_cpu
        return at.tokens * (2 * (s.d_model * (at.wide + gained) + FP32) + s.d_model * at.size)


def load_track_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by the names of the track's trainer into a model that is whole on this rank.

    Raises:
        UsageError: another model, weights that are missing or too many, another shape.
    """
    if not isinstance(model, GPTTrack3) or model.shape.fused_qkv:
        raise UsageError(
            "the track's weights fit model=gpt_track3 with model.fused_qkv=false and no other"
        )
    params = dict(model.named_parameters())
    names = {name: track_name(name) for name in params}
    if lost := sorted(set(names.values()) ^ set(weights)):
        raise UsageError(f"weights of the track's trainer and of the model: {lost[0]} is in one")
    with torch.no_grad():
        for name, param in params.items():
            given = weights[names[name]]
            if hasattr(param, "placements"):
                raise UsageError("weights of the track's trainer are read with parallel=single")
            if given.shape != param.shape:
                raise UsageError(
                    f"{names[name]} of the track's trainer is {tuple(given.shape)}, the model's "
                    f"{name} is {tuple(param.shape)}: set model/size=track3"
                )
            param.copy_(given)


_TRACK_NAMES = {
    "proj_in": "attn",
    "proj_out": "attn.proj",
    "up": "mlp.fc",
    "down": "mlp.proj",
    "norm_embed": "norm1",
    "norm": "norm2",
    "head": "proj",
}


def track_name(name: str) -> str:
    """Name of a parameter in the track's trainer, e.g. blocks.0.mlp.fc.bias of blocks.0.up.bias."""
    return ".".join(_TRACK_NAMES.get(part, part) for part in name.split("."))
