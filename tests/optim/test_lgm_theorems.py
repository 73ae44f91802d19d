"""The theorems of docs/theory.md in float64; guards, cost and drift of the solver."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geon.optim import Polar, Rule, Spectral, polar_svd
from geon.optim.linalg import Precision, orient
from geon.optim.solvers import lgm
from geon.optim.solvers.stiefel_spectral import one_shot
from tests.optim.problems import (
    BF16,
    FORMS,
    SPECTRA,
    STIEFEL,
    gauss,
    of_rank,
    point,
    problem,
    rho,
    skew,
    solve,
    spectral_norm,
    sym,
    tangency,
)

# Theorems, in float64.

DRAWS = settings(max_examples=30, deadline=None)
SIZES = {"n": st.integers(1, 9), "more": st.integers(0, 12), "seed": st.integers(0, 10**6)}


def draw(shape, seed):
    return gauss(shape, seed, torch.float64)


def frame(shape, seed):
    return polar_svd(draw(shape, seed))


def psd_power(x, power):
    values, vectors = torch.linalg.eigh(sym(x))
    return vectors * values.clamp_min(1e-300).unsqueeze(-2) ** power @ vectors.mT


def contraction(shape, seed, size=1.0):
    x = draw(shape, seed)
    return size * x / spectral_norm(x)


def skew_contraction(n, seed, size):
    z = skew(draw((n, n), seed))
    return size * z / spectral_norm(z).clamp_min(1e-300)


def inner(a, b):
    return (a * b).sum(dim=(-2, -1))


@DRAWS
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), rank=st.integers(1, 12))
def test_skew_part_of_a_contraction_is_a_contraction(n, seed, rank):
    """F2. Orthogonal matrices and low rank too: there the bound is tight."""
    x = draw((n, rank), seed) @ draw((rank, n), seed + 1)
    for a in (x / spectral_norm(x), frame((n, n), seed)):
        assert spectral_norm(skew(a)) <= 1 + 1e-12


@DRAWS
@given(**SIZES, size=st.floats(0, 1 - 1e-6))
def test_the_geometric_mean_completes_best(n, more, seed, size):
    """F3: A = U Z + P X, X = C^-1 # (I + Z^2), has A^T A = I and beats all others with this Z."""
    z, p = skew_contraction(n, seed, size), draw((n + more, n), seed + 1)
    u = frame((2 * n + more, 2 * n + more), seed + 2)
    u, normal_to_u = u[:, :n], u[:, n:]
    eye = torch.eye(n, dtype=z.dtype)
    t = psd_power(eye + z @ z, 0.5)
    x = t @ psd_power(t @ p.mT @ p @ t, -0.5) @ t
    a = u @ z + normal_to_u @ p @ x
    g = u @ draw((n, n), seed + 3) + normal_to_u @ p
    condition = torch.linalg.cond(p @ t).item()
    torch.testing.assert_close(a.mT @ a, eye, atol=1e-13 * condition**2 + 1e-12, rtol=0)
    assert tangency(u, a) <= 1e-12
    best = inner(g, a)
    for s in range(20):
        y = contraction(p.shape, seed + 10 + s) @ t
        other = u @ z + normal_to_u @ y
        assert spectral_norm(other) <= 1 + 1e-9
        assert inner(g, other) <= best + 1e-9 * (1 + best.abs())


@DRAWS
@given(**SIZES)
def test_lyapunov_gives_a_contraction(n, more, seed):
    """F4: ZQ + QZ = 2K with Q = (K^T K + C)^(1/2), C >= 0 of any rank; and CG finds that Z."""
    k, p = skew(draw((n, n), seed)), draw((max(n + more - 6, 1), n), seed + 1)
    eye = torch.eye(n, dtype=k.dtype)
    q = psd_power(k.mT @ k + p.mT @ p + 1e-4 * eye, 0.5)
    values, v = torch.linalg.eigh(q)
    z = v @ ((v.mT @ (2 * k) @ v) / (values[:, None] + values[None, :])) @ v.mT
    torch.testing.assert_close(z @ q + q @ z, 2 * k, atol=1e-10, rtol=0)
    assert spectral_norm(z) <= 1 + 1e-10
    start = skew(k @ torch.linalg.inv(q))
    assert spectral_norm(start) <= 1 + 1e-10
    found = lgm.lyapunov(q, 2 * k, start, 40 * n)
    torch.testing.assert_close(found, z, atol=1e-6, rtol=0)
    early = lgm.lyapunov(q, 2 * k, start, lgm.CG_STEPS)
    assert inner(early - z, (early - z) @ q) <= inner(start - z, (start - z) @ q) + 1e-12


@DRAWS
@given(**SIZES, angle=st.floats(0, 0.5))
def test_a_tangent_step_lengthens_by_its_own_gram(n, more, seed, angle):
    """F6: (W - eta A)^T (W - eta A) = I + eta^2 A^T A, and the retraction undoes that."""
    shape = (n + more, n)
    w, v = frame(shape, seed), draw(shape, seed + 1)
    a = v - w @ sym(w.mT @ v)
    moved, eye = w - angle * a, torch.eye(n, dtype=w.dtype)
    torch.testing.assert_close(moved.mT @ moved, eye + angle**2 * a.mT @ a)


@DRAWS
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_the_weight_is_normal_to_the_manifold(rows, cols, seed):
    """F7: so decay would be removed exactly."""
    w = point((rows, cols), seed)
    assert STIEFEL.tangent(w, w).abs().max() <= 2e-6 * w.abs().max()


def random_feasible(u, count, seed):
    """Tangent, of norm 1."""
    v = draw((count, *u.shape), seed)
    v = v - u @ sym(u.mT @ v)
    return v / spectral_norm(v)[:, None, None]


def completions(u, g, count, seed):
    """The best A with skew part Z along U, for random Z of norms between 0 and 1."""
    n = u.shape[-1]
    z = skew(draw((count, n, n), seed))
    sizes = torch.linspace(0, 1, count, dtype=z.dtype)
    z = z / spectral_norm(z).clamp_min(1e-300)[:, None, None] * sizes[:, None, None]
    t = psd_power(torch.eye(n, dtype=z.dtype) + z @ z, 0.5)
    normal_to_u = torch.linalg.qr(u, mode="complete").Q[:, n:]
    return u @ z + normal_to_u @ polar_svd(normal_to_u.mT @ g @ t) @ t


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (128, 32), (16, 64)])
def test_nothing_feasible_beats_it(shape, spectrum):
    weight, grad, u, upper = problem(spectrum, shape)
    g = orient(grad).double()
    others = random_feasible(u, 200, 1)
    if shape[0] != shape[1]:
        others = torch.cat([others, completions(u, g, 50, 2)])
    assert tangency(u, others).max() <= 1e-11
    assert spectral_norm(others).max() <= 1 + 1e-9
    best = inner(g, others).max().item()
    assert best <= upper * (1 + 1e-9)
    for form in ("gram", "rect", "gram x3", "rect bf16"):
        assert rho(form, spectrum, shape) * upper >= best, form


@pytest.mark.parametrize("spectrum", ["gauss", "spike", "flat"])
@pytest.mark.parametrize("shape", [(40, 32), (64, 32), (128, 32)])
def test_the_completion_is_the_best_for_its_part_along(shape, spectrum):
    u, g = frame(shape, 3), SPECTRA[spectrum](shape, 4).double()
    a = lgm.gram(u, g).direction
    z = u.mT @ a
    assert spectral_norm(z + z.mT) <= 1e-9
    assert spectral_norm(z) <= 1
    t = psd_power(torch.eye(len(z), dtype=z.dtype) + z @ z, 0.5)
    across = g - u @ (u.mT @ g)
    best = inner(g, u @ z) + torch.linalg.matrix_norm(across @ t, "nuc")
    assert inner(g, a) == pytest.approx(best.item(), rel=3e-3)


@pytest.mark.parametrize("spectrum", ["gauss", "flat"])
@pytest.mark.parametrize("shape", [(128, 32), (16, 256)])
def test_every_singular_value_of_a_direction_is_one(shape, spectrum):
    """Where C is well conditioned: the step turns every direction by the same angle."""
    weight, grad = point(shape), SPECTRA[spectrum](shape, 1)
    values = torch.linalg.svdvals(solve("gram", grad, weight).direction)
    assert (values - math.sqrt(1 + lgm.JITTER)).abs().max() <= 1e-3


# Guards.


CALLS = {
    "gram": lgm.gram,
    "gram x3": lambda u, g: lgm.gram(u, g, precision=Precision.BF16X3),
    "rect": lgm.rectangular,
    "rect bf16": lambda u, g: lgm.rectangular(u, g, polar=BF16),
    "rect bf16 x3": lambda u, g: lgm.rectangular(u, g, polar=BF16, precision=Precision.BF16X3),
}


@pytest.mark.parametrize("form", CALLS)
def test_a_broken_completion_falls_back_and_nothing_else_does(form, monkeypatch):
    """Admit half of a full direction's energy: rank 1 has 0.2 at most and zero none."""
    shape = (128, 32)
    u = torch.stack([point(shape, s) / STIEFEL.scale(shape) for s in (1, 2, 3)])
    g = torch.stack([torch.zeros(shape), gauss(shape, 2), of_rank(1)(shape, 3)])
    before = CALLS[form](u, g)
    assert before.fell_back.tolist() == [False, False, False]
    monkeypatch.setattr(lgm, "ENERGY", 0.5)
    after = CALLS[form](u, g)
    assert after.fell_back.tolist() == [False, True, False]
    assert torch.equal(after.direction[[0, 2]], before.direction[[0, 2]])
    stand_in = one_shot(u[1].double(), g[1].double(), polar_svd)
    assert (after.direction[1] - stand_in).abs().max() <= 1e-2
    error, before_error = ((x.direction[1] - stand_in).norm() for x in (after, before))
    assert error <= (1e-2 if form.startswith("rect bf16") else 2e-3) * stand_in.norm()
    assert error < 0.5 * before_error
    assert tangency(u[1], after.direction[1]) <= 1e-5
    monkeypatch.setattr(lgm, "ENERGY", 0.0)
    assert CALLS[form](u, g).fell_back.tolist() == [False, True, True]


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (16, 64)])
def test_a_gradient_that_is_not_finite_stays_visible_and_alone(shape, form, bad, refine):
    weights = torch.stack([point(shape, s) for s in (1, 2)])
    grads = torch.stack([gauss(shape, 1), gauss(shape, 2)])
    clean = solve(form, grads, weights, refine).direction
    grads[0, 3, 5] = bad
    found = solve(form, grads, weights, refine)
    assert found.direction[0].isnan().all()
    torch.testing.assert_close(found.direction[1], clean[1], atol=1e-3, rtol=0)
    assert found.fell_back is None or found.fell_back.tolist() == [True, False]


# Cost.


@pytest.mark.parametrize("refine", [0, 1, 2])
@pytest.mark.parametrize("ratio", [1.0625, 1.5, 2, 4, 16])
def test_products_are_counted_as_they_are_taken(ratio, refine):
    n = 64
    shape = (int(n * ratio), n)
    u, g = point(shape) / STIEFEL.scale(shape), gauss(shape)

    def products(solver):
        with FlopCounterMode(display=False) as counter:
            solver()
        return counter.get_total_flops() / (2 * n**3)

    # The power iteration is no product, and the counter does not see the Cholesky factor.
    aside = 1 / 6 - lgm.POWER_STEPS * 2 / n
    gram = products(lambda: lgm.gram(u, g, refine)) + aside
    assert gram == pytest.approx(lgm.gram_products(ratio, refine))
    factors = (2 + refine) * products(lambda: Polar()(g))
    rect = products(lambda: lgm.rectangular(u, g, refine)) + aside - factors
    assert rect == pytest.approx(lgm.rectangular_products(ratio, refine))


def test_a_step_costs_at_most_two_and_a_half_times_muons():
    """At 4 : 1. Muon: five steps of Newton-Schulz, 2 r + 1 products each."""
    retraction = 2 * 4
    assert lgm.gram_products(4) + retraction <= 2.5 * 5 * (2 * 4 + 1)


# Many steps.


def drift(shape, steps):
    """Largest |W^T W - I| on the way, gradients of noise around a constant."""
    rule = Rule(Spectral(), STIEFEL)
    weight, constant = point(shape), gauss(shape, 5)
    generator = torch.Generator().manual_seed(6)
    eye, worst = torch.eye(min(shape), dtype=torch.float64), 0.0
    for step in range(steps):
        grad = constant + torch.randn(shape, generator=generator)
        weight = rule.move(weight, rule.solve(grad, weight).direction, 0.03)
        if step % 10 == 9:
            u = orient(weight).double() / STIEFEL.scale(shape)
            worst = max(worst, (u.mT @ u - eye).abs().max().item())
    return worst


@pytest.mark.parametrize("shape", [(64, 16), (24, 16), (16, 16), (16, 64)])
def test_400_steps_stay_on_the_manifold(shape):
    assert drift(shape, 400) <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 16), (24, 16), (16, 16), (16, 64)])
def test_10000_steps_stay_on_the_manifold(shape):
    assert drift(shape, 10_000) <= 5e-6
