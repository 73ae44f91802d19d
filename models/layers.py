"""Blocks that several architectures share. Shapes: B batch, T time, D width, H heads, K = D/H."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geon.models.rope import Tables, made_once
from geon.models.tensor import summed


def lowered(x: Tensor) -> Tensor:
    """Cast to the dtype of autocast, where that is on: what an embedding gives is fp32 there."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def rms_norm(x: Tensor, gains: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, with gains or without, in the dtype of x.

    The sums are in fp32 all the same. Autocast would return fp32, and keep it for the backward
    pass: twice the memory of the residual stream.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight = None if gains is None else gains.to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), weight, eps)


def joined(x: Tensor, branch: Tensor, share: float | None) -> Tensor:
    """X + branch, or with a share s the mean (1 - s) x + s branch."""
    return x + branch if share is None else torch.lerp(x, branch, share)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, in the dtype of its input under autocast too; see rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        r = x.relu()
        ctx.save_for_backward(r)
        ctx.scale = scale
        squared = r * r
        return squared if scale == 1.0 else squared.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2.0 * ctx.scale), None


def relu_squared(x: Tensor, scale: float = 1.0) -> Tensor:
    """Scale * max(x, 0)^2 (So et al., arXiv 2109.08668), keeping one tensor for the backward pass.

    Autograd's own composition reads memory five times more in the backward pass; on a CPU that is
    a tenth of a small model's step.
    """
    return _ReluSquared.apply(x, scale)


@made_once
def rotary_table(time: int, head_dim: int, base: float, device: torch.device) -> Tables:
    """Cosines and sines (T, K/2) of the rotary angles t * base^(-2i/K), in fp32."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.arange(time, device=device).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + K/2}) of x (B, T, H, K) by minus the angle of their position.

    The sign is that of nanochat, whose Hugging Face class is the export target; attention sees
    only differences of angles, so either sign trains the same.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Norm(nn.Module):
    """RMSNorm with gains, in the dtype of its input.

    group: tensor ranks that norm each their own heads; see models/tensor.py.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.group = eps, None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, summed(self.weight, self.group), self.eps)


class GainLinear(nn.Linear):
    """x -> diag(rows) W diag(cols) x: a matrix whose manifold fixes its size learns it here.

    The gains multiply the weight, not the activations, which are many more.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.rows = nn.Parameter(torch.ones(d_out))
        self.cols = nn.Parameter(torch.ones(d_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        return F.linear(x, self.rows[:, None] * self.weight * self.cols)


def linear(d_in: int, d_out: int, bias: bool = False, gains: bool = False) -> nn.Linear:
    """A hidden matrix, with gains where the model has them."""
    return GainLinear(d_in, d_out) if gains else nn.Linear(d_in, d_out, bias=bias)


class Projections(nn.Module):
    """The q, k and v projections: three weights, or one fused with rows (q, k, v)."""

    def __init__(self, d_model: int, fused: bool, bias: bool, gains: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = linear(d_model, 3 * d_model, bias, gains)
        else:
            self.q, self.k, self.v = (linear(d_model, d_model, bias, gains) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> three of (B, T, D)."""
        if self.fused:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            return q, k, v
        return self.q(x), self.k(x), self.v(x)


def head_axes(n_head: int) -> dict[str, tuple[int, int]]:
    """Heads of each attention weight by the ending of its name: (count, axis that they share).

    Heads own rows of q, k and v (of each, when fused) and columns of the output projection.
    """
    names = ("q.weight", "k.weight", "v.weight", "qkv.weight")
    return {**dict.fromkeys(names, (n_head, 0)), "proj_out.weight": (n_head, 1)}


def ends_plan() -> dict[str, Any]:
    """Tensor parallelism of an embedding and a head: cut by tokens, logits gathered."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def block_plan(attention: str = "", more: Sequence[str] = ()) -> dict[str, Any]:
    """Tensor parallelism of the blocks (Shoeybi et al., arXiv 1909.08053).

    What makes heads and neurons is cut by rows, what reads them by columns, and a sum over the
    ranks ends each branch. attention: path of the attention inside a block, with its dot.
    more: names of other matrices that make neurons.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    rows = [f"{attention}proj_in.{part}" for part in "qkv"] + ["up", *more]
    plan: dict[str, Any] = {f"blocks.*.{name}": ColwiseParallel() for name in rows}
    for name in (f"{attention}proj_out", "down"):
        plan[f"blocks.*.{name}"] = RowwiseParallel()
    return plan


_COMPOSED = 512
"""Longest sequence whose bf16 attention a CPU composes of products: there torch's fused kernel
takes 4 times as long at 128 tokens, as long at 1,024. In fp32 the kernel is faster."""


def composes(device: str, dtype: torch.dtype, time: int) -> bool:
    """Whether attention is composed of products, and keeps T^2 numbers for each head."""
    return device == "cpu" and dtype is torch.bfloat16 and time <= _COMPOSED


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of (B, T, H, K) by PyTorch's SDPA; returns (B, T, H K).

    Keys and values may have fewer heads, each of which is read by H / heads queries in a row.

    scale: factor on products of queries and keys; None takes 1/sqrt(K).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if composes(q.device.type, q.dtype, q.shape[2]):
        return _composed(q, k, v, scale).transpose(1, 2).flatten(2)
    shared = q.shape[1] != k.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    return mixed.transpose(1, 2).flatten(2)


def _composed(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention of (B, H, T, K) by two products and a softmax; keeps B H T^2 numbers."""
    batch, heads, time, width = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    later = torch.full((time, time), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    with torch.autocast("cpu", enabled=False):
        odds = torch.baddbmm(later, q, k.mT, alpha=scale or width**-0.5).softmax(-1)
        return torch.bmm(odds, v).unflatten(0, (batch, -1))
