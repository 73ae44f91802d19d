import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geon.optim.linalg import Precision, orient, orient_like, product, unit_frobenius
from geon.optim.polar import CUBIC, POLAR_EXPRESS, bounds, inverse_sqrt, polar_svd

FP32_LIKE = [None, Precision.FP32, Precision.BF16X3]


def polar_gram(matrix, steps=7, coefficients=POLAR_EXPRESS, precision=None, ridge=None):
    """M (M^T M)^(-1/2): a polar factor that only `inverse_sqrt` makes one."""
    x = matrix if precision is None else precision.cast(matrix)
    x = unit_frobenius(orient(x))
    root = inverse_sqrt(product(x.mT, x, precision), steps, coefficients, precision, ridge)
    return orient_like(product(x, root, precision), matrix).to(matrix.dtype)


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(shape, values, seed=0):
    """Matrix in fp64 with these singular values and random singular vectors."""
    u, _ = torch.linalg.qr(gauss((shape[0], len(values)), seed).double())
    v, _ = torch.linalg.qr(gauss((shape[1], len(values)), seed + 1).double())
    return (u * torch.as_tensor(values, dtype=torch.float64)) @ v.mT


def spike(shape):
    """Spectrum 60 exp(-40 i/n) + 0.2 + 1.6 (1 - i/n): the shape of real momentum."""
    i = torch.arange(1, min(shape) + 1, dtype=torch.float64) / min(shape)
    return with_spectrum(shape, 60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i)).float()


def norm2(x):
    return torch.linalg.matrix_norm(x.double(), 2).item()


@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("shape", [(256, 64), (64, 256)])
@pytest.mark.parametrize("precision", FP32_LIKE)
def test_the_gram_form_against_svd(shape, make, precision):
    """Without a ridge; measured 3e-6 and 7e-5 (fp32), 7e-5 and 2e-3 (bf16x3) at 1024 x 256."""
    g = make(shape)
    out = polar_gram(g, steps=8, precision=precision, ridge=0.0).double()
    error = norm2(out - polar_svd(g))
    fine = {gauss: 2e-5, spike: 1e-3}[make]
    assert error < (fine if precision is not Precision.BF16X3 else 40 * fine)


@pytest.mark.parametrize("make", [gauss, spike])
def test_the_gram_form_is_the_same_iteration(make):
    """Same table, same norm divided out: equal step for step, not only in the limit."""
    g = make((40, 12)).double()
    g = g / (1.001 * (g.mT @ g).norm()).sqrt()
    for steps in (1, 2, 5):
        x = g
        for a, b, c in POLAR_EXPRESS.steps(steps):
            gram = x.mT @ x
            x = a * x + b * x @ gram + c * x @ gram @ gram
        torch.testing.assert_close(polar_gram(g, steps), x, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "precision", "condition", "limit"),
    [
        (torch.float64, None, 1e3, 1e-8),
        (torch.float32, None, 1e2, 4e-2),
        (torch.float32, Precision.BF16X3, 1e1, 2e-2),
    ],
)
@pytest.mark.parametrize("small", [1, 32, 63])
def test_inverse_sqrt_inverts_as_claimed(dtype, precision, condition, limit, small):
    values = torch.ones(64, dtype=torch.float64)
    values[:small] = 1 / condition
    m = with_spectrum((64, 64), values)
    gram = (m.mT @ m).to(dtype)
    for table in (POLAR_EXPRESS, replace(POLAR_EXPRESS, safety=1.005)):
        x = inverse_sqrt(gram, 12, table, precision)
        assert torch.equal(x, x.mT)
        residual = norm2(x.double() @ gram.double() @ x.double() - torch.eye(64))
        assert residual < limit
    rounding = inverse_sqrt(gram, 12, precision=precision, ridge=0.0).double()
    assert norm2(rounding @ gram.double() @ rounding - torch.eye(64)) < limit / 4


@pytest.mark.parametrize("exponent", [-30, -12, 0, 12, 30])
def test_inverse_sqrt_at_every_scale(exponent):
    m = gauss((65, 33)).double()
    gram = m.mT @ m
    x = inverse_sqrt((gram * 10.0**exponent).float(), 8).double() * 10.0 ** (exponent / 2)
    assert norm2(x @ gram @ x - torch.eye(33)) < 1e-3


@pytest.mark.parametrize("precision", FP32_LIKE)
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize(("n", "rank"), [(32, 16), (64, 1), (128, 120)])
def test_singular_grams_stay_finite_however_many_steps(n, rank, steps, precision):
    g = gauss((2 * n, rank)) @ gauss((rank, n), 1)
    out = polar_gram(g, steps, precision=precision)
    assert norm2(out) < 1.01
    x = inverse_sqrt(g.mT @ g, steps, precision=precision)
    ridge = 3.8e-6 if precision is Precision.BF16X3 else 2.4e-7
    assert norm2(x) < 2.0 / math.sqrt(ridge * (g.mT @ g).norm())


def test_without_a_ridge_singular_grams_do_not():
    g = gauss((64, 1)) @ gauss((1, 64), 1)
    out = polar_gram(g, 14, ridge=0.0)
    assert not torch.isfinite(out).all() or norm2(out) > 2


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 24),
    rank=st.integers(1, 24),
    steps=st.integers(1, 12),
    scale=st.floats(-28, 28),
    seed=st.integers(0, 10**6),
    precision=st.sampled_from(FP32_LIKE),
)
def test_inverse_sqrt_never_overshoots(n, rank, steps, scale, seed, precision):
    m = gauss((rank, n), seed)
    gram = (m.mT @ m) * 10.0**scale
    x = inverse_sqrt(gram, steps, precision=precision)
    assert torch.isfinite(x).all() and torch.equal(x, x.mT)
    x = x.double() * 10.0 ** (scale / 2)
    # 1 is overshot by at most what the table itself overshoots after so many steps.
    top = bounds(POLAR_EXPRESS.steps(steps), 0.0)[1]
    assert norm2(x @ (m.mT @ m).double() @ x) < 1.1 * top**2


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("table", [POLAR_EXPRESS, CUBIC])
def test_products_of_the_gram_form(table, steps):
    n, rows, squares = 8, 24, steps if table is POLAR_EXPRESS else 0
    with FlopCounterMode(display=False) as counter:
        inverse_sqrt(torch.eye(n), steps, table)
    assert counter.get_total_flops() == (3 * (steps - 1) + squares) * 2 * n**3
    with FlopCounterMode(display=False) as thin:
        polar_gram(gauss((rows, n)), steps, table)
    assert thin.get_total_flops() == counter.get_total_flops() + 4 * rows * n * n


@pytest.mark.parametrize("function", [polar_gram, inverse_sqrt])
def test_the_gram_form_refuses_bf16(function):
    with pytest.raises(ValueError, match="bf16.*optim.polar.dtype"):
        function(torch.eye(4), precision=Precision.BF16)
    with pytest.raises(ValueError, match="torch.bfloat16.*optim.polar.dtype"):
        function(torch.eye(4).bfloat16())
