"""Largest singular values without an SVD: found, and capped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geon.optim.manifolds import Stiefel
from geon.optim.manifolds.spectral import SpectralBall, hard_cap, schatten_64, top_pair, top_value
from tests.optim.test_manifolds import gauss, seeded


@pytest.mark.parametrize("doublings", [4, 8])
@pytest.mark.parametrize("gap", [0.0, 1e-4, 1e-2, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(40, 40), (10, 60), (60, 10), (1, 7)])
def test_top_pair_is_as_near_as_the_bound_says(shape, gap, doublings):
    u, s, vh = torch.linalg.svd(gauss(shape), full_matrices=False)
    s = torch.full_like(s, 1 - gap)
    s[0] = 1
    w = 1e-20 * ((u * s) @ vh)
    left, right = top_pair(w, doublings)
    torch.testing.assert_close(left.norm(), torch.ones_like(s[0]))
    torch.testing.assert_close(right.norm(), torch.ones_like(s[0]))
    assert 1e20 * (left.mT @ w @ right).item() >= min(shape) ** (-1 / 2 ** (doublings + 1)) - 1e-12
    if gap == 0.9:
        torch.testing.assert_close(left @ right.mT, u[:, :1] @ vh[:1], atol=1e-8, rtol=0)


def test_top_pair_of_zero_is_zero():
    for vector in top_pair(torch.zeros(2, 3, 4)):
        assert torch.equal(vector, torch.zeros_like(vector))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-4, 1e-2, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(40, 40), (10, 60), (60, 10), (1, 7), (1, 1)])
def test_top_value_is_the_spectral_norm_up_to_the_bound_of_top_pair(shape, gap, dtype):
    """Beside SVD, in a batch of sizes around 1; zero for zero."""
    u, s, vh = torch.linalg.svd(gauss(shape), full_matrices=False)
    s = torch.full_like(s, 1 - gap)
    s[0] = 1
    sizes = torch.tensor([1e-3, 1.0, 1e3, 0.0], dtype=torch.float64)[:, None, None]
    batch = (sizes * ((u * s) @ vh)).to(dtype)
    found = top_value(batch)
    assert found.shape == (4, 1, 1)
    assert found.dtype == dtype
    exact, rounding = torch.linalg.matrix_norm(batch.double(), 2), 8 * torch.finfo(dtype).eps
    short = found[:3, 0, 0].double() / exact[:3]
    assert short.max() <= 1 + rounding
    assert short.min() >= min(shape) ** (-1 / 2**9) - rounding
    assert found[3].item() == 0
    left, right = top_pair(batch)
    torch.testing.assert_close(found, left.mT @ batch @ right)


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    rank=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_top_value_of_any_matrix(rows, cols, rank, seed):
    """Low rank too, which has powers of the Gram that vanish in most directions."""
    w = (gauss((rows, rank), seed) @ gauss((rank, cols), seed + 1)).float()
    exact = torch.linalg.matrix_norm(w.double(), 2).item()
    bound = min(rows, cols) ** (-1 / 2**9)
    assert bound * exact * (1 - 1e-5) <= top_value(w).item() <= exact * (1 + 1e-5)


def test_a_large_matrix_of_equal_singular_values_does_not_vanish():
    """Powers of its Gram have the smallest entries: each is a multiple of the identity."""
    w = Stiefel().random_point((768, 512), seeded(1)) / math.sqrt(768 / 512)
    torch.testing.assert_close(top_value(w).item(), 1.0, atol=1e-5, rtol=0)
    u, v = top_pair(w)
    torch.testing.assert_close((u.mT @ w @ v).item(), 1.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_hard_cap_caps_and_keeps_small_singular_values(shape):
    u, s, vh = torch.linalg.svd(gauss(shape).float(), full_matrices=False)
    s = torch.logspace(-6, 0.7, len(s))
    capped = hard_cap((u * s) @ vh, 2.0)
    torch.testing.assert_close(capped, (u * s.clamp(max=2.0)) @ vh, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
def test_the_ball_asks_by_a_norm_just_above_the_spectral_one(shape):
    ball, n = SpectralBall(1.7), min(shape)
    draw = gauss(shape).float()
    draw = draw / torch.linalg.matrix_norm(draw, 2)
    with FlopCounterMode(display=False) as counter:
        norm = schatten_64(draw)
    assert counter.get_total_flops() == ball.cost(shape).fp32
    spectrum = torch.linalg.svdvals(draw.double())
    torch.testing.assert_close(norm, (spectrum**64).sum().float() ** (1 / 64))
    unit = draw * ball.bound(shape)
    inside, outside = 0.98 * n ** (-1 / 64) * unit, 1.2 * unit
    assert ball.retract(inside) is inside
    assert ball.project(inside) is inside
    both = ball.retract(torch.stack([inside, outside]))
    assert torch.equal(both[0], inside)
    assert ball.residual(both[1]) < 1e-4
    assert ball.retract(torch.full_like(draw, math.nan)).isnan().all()
