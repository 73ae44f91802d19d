"""Manifold Muon against certified fp64 optima of its constrained problem."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.errors import UsageError
from geon.optim import Polar, Rule, Spectral, Stiefel, polar_svd
from geon.optim.linalg import Precision, orient
from geon.optim.norms import Sign
from geon.optim.solvers import Ladder, steepest
from geon.optim.solvers.exact import certified_optimum

STIEFEL = Stiefel()
SHAPES = [(64, 64), (33, 33), (64, 16), (48, 32), (16, 64), (9, 8)]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def point(shape, seed=1, manifold=STIEFEL):
    return manifold.random_point(shape, torch.Generator().manual_seed(seed))


def spike(shape, seed=0):
    """Spectrum 60 exp(-40 i/n) + 0.2 + 1.6 (1 - i/n): the shape of real momentum."""
    u, s, vh = torch.linalg.svd(gauss(shape, seed), full_matrices=False)
    i = torch.arange(len(s)) / len(s)
    return (u * (60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i))) @ vh


def low_rank(shape, seed=0):
    return gauss((shape[0], 4), seed) @ gauss((4, shape[1]), seed + 1)


def direction(grad, weight, manifold=STIEFEL, steps=8, method="oneshot"):
    """Direction divided by its scale, tall."""
    norm = Spectral(polar=Polar(steps=steps))
    out = steepest(norm, manifold, Ladder(method))(grad, weight).direction
    return orient(out) / norm.factor(grad.shape)


def rho(grad, weight, a):
    """Descent of the feasible part of a step over the certified optimum."""
    u = polar_svd(STIEFEL.unit(weight))
    best = certified_optimum(u, orient(grad))
    assert best.gap < 1e-5
    a = a.double()
    a = a - u @ (u.mT @ a + a.mT @ u) / 2
    a = a / max(1.0, torch.linalg.matrix_norm(a, 2).item())
    return (orient(grad).double() * a).sum().item() / best.dual


@pytest.mark.parametrize("make", [gauss, spike, low_rank])
@pytest.mark.parametrize("shape", [(24, 24), (48, 24), (12, 48), (17, 16)])
def test_oracle_is_certified_independently(shape, make):
    """Weak duality alone: a feasible point below, a nuclear norm above, both by plain SVD."""
    u, g = polar_svd(STIEFEL.unit(point(shape))), orient(make(shape)).double()
    best = certified_optimum(u, g)
    a, s = best.direction, best.multiplier
    assert torch.linalg.matrix_norm(u.mT @ a + a.mT @ u) < 1e-12 * math.sqrt(len(s))
    assert torch.linalg.matrix_norm(a, 2) < 1 + 1e-9
    torch.testing.assert_close(s, s.mT)
    upper = torch.linalg.matrix_norm(g + u @ s, "nuc").item()
    lower = (g * a).sum().item()
    assert upper == pytest.approx(best.dual, rel=1e-6)
    assert lower == pytest.approx(best.primal, rel=1e-9)
    assert lower <= upper * (1 + 1e-12)
    assert (upper - lower) / upper < 1e-4


@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("n", [128, 64, 33])
def test_square_is_optimal(n, make):
    """Here the optimum is known: S = -sym(U^T G) bounds it by the nuclear norm of the skew part."""
    grad, weight = make((n, n)), point((n, n))
    u = polar_svd(weight)
    skew = (u.mT @ grad.double() - grad.double().mT @ u) / 2
    best = torch.linalg.matrix_norm(skew, "nuc")
    for steps, shortfall in ((14, 1e-6), (6, 5e-3)):
        a = direction(grad, weight, steps=steps).double()
        a = a / max(1.0, torch.linalg.matrix_norm(a, 2).item())
        assert 1 - (grad.double() * a).sum() / best < shortfall
    assert rho(grad, weight, direction(grad, weight, steps=14)) > 1 - 1e-5


@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("shape", [(64, 16), (48, 32), (16, 64)])
def test_one_shot_descends_at_least_88_percent_of_the_optimum(shape, make):
    grad, weight = make(shape), point(shape)
    ours = rho(grad, weight, direction(grad, weight))
    assert ours > 0.88
    # Doing nothing about the constraint (the polar factor of the raw gradient) must be worse.
    raw = Polar(steps=8)(orient(grad))
    assert rho(grad, weight, raw) < ours


@pytest.mark.parametrize("exponent", [-30, -8, 0, 8, 30])
@pytest.mark.parametrize("make", [gauss, spike, low_rank])
@pytest.mark.parametrize("shape", SHAPES)
def test_tangent_and_bounded_at_every_scale(shape, make, exponent):
    weight, grad = point(shape), make(shape) * 10.0**exponent
    a, u = direction(grad, weight), STIEFEL.unit(weight)
    tangency = torch.linalg.matrix_norm(u.mT @ a + a.mT @ u) / math.sqrt(min(shape))
    assert tangency <= 1e-5
    assert torch.linalg.matrix_norm(a, 2) <= 2 / math.sqrt(3) * 1.005


def test_bf16_polar_factors_stay_tangent():
    weight, grad = point((128, 32)), gauss((128, 32))
    norm = Spectral(polar=Polar(precision=Precision.BF16))
    a, u = (
        steepest(norm, STIEFEL, Ladder("oneshot"))(grad, weight).direction / 2.0,
        STIEFEL.unit(weight),
    )
    assert torch.linalg.matrix_norm(u.mT @ a + a.mT @ u) / math.sqrt(32) <= 1e-5


@pytest.mark.parametrize("lr", [0.003, 0.05, 0.2])
@pytest.mark.parametrize("radius", [1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_stays_on_the_manifold_for_100_steps(shape, radius, lr):
    manifold = Stiefel(radius=radius)
    rule = Rule(Spectral(), manifold, radius=radius)
    weight = point(shape, manifold=manifold)
    for step in range(100):
        weight = rule.move(weight, rule.solve(gauss(shape, step), weight).direction, lr)
    tall = orient(weight).double() / (radius * math.sqrt(shape[0] / shape[1]))
    defect = (tall.mT @ tall - torch.eye(min(shape))).abs().max()
    assert defect <= 1e-5


def test_learning_rate_is_the_angle():
    """Each unit direction of a square weight turns by atan(lr)."""
    weight, grad = point((32, 32)), gauss((32, 32))
    rule = Rule(Spectral(polar=Polar(steps=14)), STIEFEL)
    turned = weight.mT @ rule.move(weight, rule.solve(grad, weight).direction, 0.04)
    angles = torch.linalg.eigvals(turned.double()).angle().abs()
    assert angles.median().item() == pytest.approx(math.atan(0.04), rel=1e-3)


def test_equivariance():
    """Rotating weight and gradient together rotates the direction."""
    weight, grad = point((48, 16)), gauss((48, 16))
    left, right = point((48, 48), 7), point((16, 16), 8)
    rotated = direction(left @ grad @ right, left @ weight @ right)
    torch.testing.assert_close(rotated, left @ direction(grad, weight) @ right, atol=2e-4, rtol=0)


def test_zero_direction_leaves_the_weight_bitwise():
    weights = torch.stack([point((24, 8), s) for s in (1, 2)])
    grads = torch.stack([torch.zeros(24, 8), gauss((24, 8))])
    rule = Rule(Spectral(), STIEFEL)
    moved = rule.move(weights, rule.solve(grads, weights).direction, 0.05)
    assert torch.equal(moved[0], weights[0])
    assert not torch.equal(moved[1], weights[1])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 30), cols=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_projection_to_the_tangent_space_lengthens_by_two_over_root_three_at_most(rows, cols, seed):
    """F1 of the notes: ||P A||_2 <= (2 / sqrt 3) ||A||_2."""
    w, a = point((rows, cols), seed), gauss((rows, cols), seed + 1)
    projected = STIEFEL.tangent(w, a)
    bound = 2 / math.sqrt(3) * torch.linalg.matrix_norm(a, 2)
    assert torch.linalg.matrix_norm(projected, 2) <= bound * (1 + 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_retraction_contracts_as_promised(shape):
    """One step takes an error delta to at most (3/4) delta^2, plus rounding."""
    w = point(shape).double()
    w = w + 0.01 * gauss(shape, 3).double() * w.abs().mean()
    before = _defect(w)
    after = _defect(STIEFEL.retract(w))
    assert after <= 0.76 * before**2 + 1e-12


def _defect(w):
    u = STIEFEL.unit(w)
    return torch.linalg.matrix_norm(u.mT @ u - torch.eye(u.shape[-1], dtype=u.dtype), 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_manifold_verbs(shape):
    w, v = point(shape), gauss(shape, 4)
    assert STIEFEL.residual(w) < 2e-6
    tangent = STIEFEL.tangent(w, v)
    torch.testing.assert_close(STIEFEL.tangent(w, tangent), tangent, atol=1e-5, rtol=0)
    torch.testing.assert_close(STIEFEL.project(w), w, atol=1e-5, rtol=0)
    torch.testing.assert_close(STIEFEL.project(3 * w), w, atol=1e-5, rtol=0)


def test_refusals_say_why():
    with pytest.raises(UsageError, match=r"weight decay 0\.1.*normal to the manifold"):
        Rule(Spectral(), STIEFEL, decay=0.1)
    with pytest.raises(UsageError, match="no solver for norm 'Sign'"):
        Rule(Sign(), STIEFEL)
    with pytest.raises(UsageError, match="spectral_scale"):
        Rule(Spectral(scale="muon"), STIEFEL)
    with pytest.raises(ValueError, match="zero_init_proj"):
        STIEFEL.project(torch.zeros(8, 4))
