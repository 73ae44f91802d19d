"""The mean cross-entropy of a head's logits, which turn into their own gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    bias: Tensor | None = None,
    rational: bool = False,
) -> Tensor:
    """Mean cross-entropy, in nats, of the logits scale * (x W' + bias), softcapped when asked.

    The forward pass finds the gradients as well, where they are wanted. So one copy of the logits
    exists at a time, in the dtype of x (under autocast, in its dtype), and none in between the
    passes; sums and exponentials are in fp32, or in fp64 for fp64.

    Shapes: x (..., d), weight (vocab, d), targets (...) int64; IGNORED ones do not count; bias
    (vocab,).
    softcap: logits z become softcap * tanh(z / softcap); 0 leaves them.
    rational: they become softcap * z / sqrt(z^2 + softcap^2) instead.
    chunks: pieces that the rows are cut into; logits of one piece exist at a time.
    """
    x = lowered(x)
    cap = _Cap(scale, softcap, rational)
    inputs = (x.flatten(0, -2), weight, bias, targets.flatten(), cap, chunks)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            return _WithGradients.apply(*inputs)
        return _evaluate(*inputs)[0]


class _Cap(NamedTuple):
    """What is done to logits: a factor, and the bound and form of a softcap."""

    scale: float
    bound: float
    rational: bool


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Any) -> Tensor:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        loss, dw, db = _evaluate(x, weight, bias, *inputs, dx)
        ctx.save_for_backward(dx, dw, db)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        found = [d if d is None else (d * grad).to(d.dtype) for d in ctx.saved_tensors]
        return (*found, None, None, None)


def _evaluate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: _Cap,
    chunks: int,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and gradients of weight and bias; that of x is written to dx, if it is given."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cast, dw = weight.to(x.dtype), None
    shift = None if bias is None else bias.to(x.dtype)
    db = None if bias is None or dx is None else torch.zeros_like(bias, dtype=wide)
    counts = targets != IGNORED
    share = counts.to(wide) / counts.sum()
    targets = targets.where(counts, 0)
    loss = torch.zeros((), dtype=wide, device=x.device)
    size = -(-len(x) // chunks)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        logits = F.linear(x[rows], cast, shift)
        shares = share[rows]
        loss = loss + _losses(logits, targets[rows], shares, cap, dx is not None)
        if dx is not None:
            dx[rows] = logits @ cast
            piece = (logits.mT @ x[rows]).to(wide)
            dw = piece if dw is None else dw + piece
            if db is not None:
                db = db + logits.sum(0, dtype=wide)
    return (
        loss,
        dw if dw is None else dw.to(weight.dtype),
        db if db is None or bias is None else db.to(bias.dtype),
    )


def _losses(logits: Tensor, targets: Tensor, shares: Tensor, cap: _Cap, gradient: bool) -> Tensor:
    """Sum of shares * losses of the rows; with `gradient`, the logits become its gradient."""
    scale, softcap, rational = cap
    compiling = torch.compiler.is_compiling()  # then it is one kernel, whatever the size
    rows = len(logits) if compiling else block_rows(logits.device.type, logits.shape[1])
    total = torch.zeros((), dtype=shares.dtype, device=logits.device)
    for first in range(0, len(logits), rows):
        block, share = logits[first : first + rows], shares[first : first + rows, None]
        target = targets[first : first + rows, None]
        z = block.to(shares.dtype)  # itself in fp32
        if softcap:  # z becomes the capped logits over the cap
            z.mul_(scale / softcap)
            z = z.mul_(z.square().add_(1.0).rsqrt_()) if rational else z.tanh_()
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
        if softcap and rational:  # the slope is (1 - z^2)^(3/2)
            odds.mul_(z.square().neg_().add_(1.0).pow_(1.5))
        elif softcap:
            odds = torch.addcmul(odds, odds * z, z, value=-1)
        block.copy_(odds)
    return total
