"""The mean cross-entropy of a head's logits, which turn into their own gradient."""

from typing import Any

import torch
from torch import Tensor

from geon.models.layers import lowered

IGNORED = -100
"""Target that counts for nothing, as in torch."""

_CPU_BLOCK, _BLOCK = 2**18, 2**25
"""Logits that are widened at a time: they stay in a CPU's cache, and keep a GPU busy."""


def block_rows(kind: str, vocab_size: int) -> int:
    """Rows of logits that are widened at a time on a device of a kind, outside of compiled code."""
    return max(1, (_CPU_BLOCK if kind == "cpu" else _BLOCK) // vocab_size)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    chunks: int = 1,
) -> Tensor:
    """Mean cross-entropy, in nats, of the logits scale * (x W'), softcapped when asked.

    The forward pass finds the gradients as well, where they are wanted. So one copy of the logits
    exists at a time, in the dtype of x (under autocast, in its dtype), and none in between the
    passes; sums and exponentials are in fp32, or in fp64 for fp64.

    Shapes: x (..., d), weight (vocab, d), targets (...) int64; IGNORED ones do not count.
    softcap: logits become softcap * tanh(logits / softcap); 0 leaves them.
    chunks: pieces that the rows are cut into; logits of one piece exist at a time.
    """
    x = lowered(x)
    inputs = (x.flatten(0, -2), weight, targets.flatten(), scale, softcap, chunks)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            return _WithGradients.apply(*inputs)
        return _evaluate(*inputs)[0]


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *inputs: Any) -> Tensor:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        loss, dw = _evaluate(x, weight, *inputs, dx)
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, dw = ctx.saved_tensors
        return (dx * grad).to(dx.dtype), (dw * grad).to(dw.dtype), None, None, None, None


def _evaluate(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float,
    chunks: int,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss and the gradient of the weight; that of x is written to dx, if it is given."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cast, dw = weight.to(x.dtype), None
    counts = targets != IGNORED
    share = counts.to(wide) / counts.sum()
    targets = targets.where(counts, 0)
    loss = torch.zeros((), dtype=wide, device=x.device)
    size = -(-len(x) // chunks)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        logits = x[rows] @ cast.mT
        shares = share[rows]
        loss = loss + _losses(logits, targets[rows], shares, scale, softcap, dx is not None)
        if dx is not None:
            dx[rows] = logits @ cast
            piece = (logits.mT @ x[rows]).to(wide)
            dw = piece if dw is None else dw + piece
    return loss, dw if dw is None else dw.to(weight.dtype)


def _losses(
    logits: Tensor, targets: Tensor, shares: Tensor, scale: float, softcap: float, gradient: bool
) -> Tensor:
    """Sum of shares * losses of the rows; with `gradient`, the logits become its gradient."""
    compiling = torch.compiler.is_compiling()  # then it is one kernel, whatever the size
    rows = len(logits) if compiling else block_rows(logits.device.type, logits.shape[1])
    total = torch.zeros((), dtype=shares.dtype, device=logits.device)
    for first in range(0, len(logits), rows):
        block, share = logits[first : first + rows], shares[first : first + rows, None]
        target = targets[first : first + rows, None]
        z = block.to(shares.dtype)  # itself in fp32
        if softcap:
            z.mul_(scale / softcap).tanh_()
        elif scale != 1.0:
            z.mul_(scale)
        odds = torch.log_softmax(z * softcap if softcap else z, dim=-1)
        total = total - (odds.gather(1, target) * share).sum()
        if not gradient:
            continue
        odds.exp_()
        if compiling:
            odds = odds - (torch.arange(odds.shape[1], device=odds.device) == target).to(odds.dtype)
        else:
            odds.scatter_add_(1, target, odds.new_full((1, 1), -1.0).expand_as(target))
        odds.mul_(share * scale)
        if softcap:
            odds = torch.addcmul(odds, odds * z, z, value=-1)
        block.copy_(odds)
    return total
