"""Attention beside a softmax in fp64."""

import pytest
import torch

from geon.models.layers import attend


@pytest.mark.parametrize("time", [1, 40, 512, 513])
def test_bf16_attention_on_a_cpu_is_causal_attention(time):
    """Composed up to 512 tokens, torch's kernel above; against a softmax in fp64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, time, 3, 8, generator=generator) for _ in range(3))
    q, k, v = (t.bfloat16().requires_grad_() for t in (q, k, v))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bthk,bshk->bhts", wide[0], wide[1]) / 8**0.5
    future = torch.ones(time, time, dtype=torch.bool).triu(1)
    odds = scores.masked_fill(future, -torch.inf).softmax(-1)
    exact = torch.einsum("bhts,bshk->bthk", odds, wide[2]).flatten(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype is torch.bfloat16
    weights = torch.randn(exact.shape, generator=generator)
    (found.float() * weights).sum().backward()
    (exact * weights).sum().backward()
    for got, want in [
        (found, exact),
        *((a.grad, b.grad) for a, b in zip((q, k, v), wide, strict=True)),
    ]:
        assert (got.double() - want).norm() <= 0.02 * want.norm()
