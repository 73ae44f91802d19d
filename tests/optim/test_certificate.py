"""The bracket that certificates put around the optimum, and the published solver beside it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geon.optim import Polar, Spectral, Stiefel, polar_svd
from geon.optim.solvers import Ladder, certify, lgm, steepest
from geon.optim.solvers.exact import certified_optimum
from geon.optim.solvers.published import dual_ascent, dual_ascent_products
from geon.optim.solvers.stiefel_spectral import one_shot


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frame(shape, seed=1):
    """An orthonormal U in float64; seeds apart from those of `gauss`."""
    return polar_svd(gauss(shape, seed + 1000))


def spike(shape, seed=0):
    """Spectrum 60 exp(-40 i/n) + 0.2 + 1.6 (1 - i/n): the shape of real momentum."""
    u, s, vh = torch.linalg.svd(gauss(shape, seed), full_matrices=False)
    i = torch.arange(len(s)) / len(s)
    return (u * (60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i))) @ vh


def rank_one(shape, seed=0):
    return gauss((shape[0], 1), seed) @ gauss((1, shape[1]), seed + 1)


MAKES = [gauss, spike, rank_one]
SHAPES = [(24, 24), (17, 16), (24, 16), (32, 16), (64, 16), (9, 1)]


def sym(x):
    return (x + x.mT) / 2


def defect(u, a):
    """||U^T A + A^T U||_F / sqrt(n)."""
    return 2 * torch.linalg.matrix_norm(sym(u.mT.double() @ a.double())) / math.sqrt(u.shape[-1])


def shrunk(u, a):
    """The feasible part: projected, then divided by a norm above 1."""
    a = a.double() - u @ sym(u.mT @ a.double())
    return a / torch.linalg.matrix_norm(a, 2).clamp_min(1.0)


def directions(u, g):
    """Feasible and not, good and bad."""
    u, g = u.float(), g.float()
    return {
        "lgm": lgm.gram(u, g).direction,
        "one-shot": one_shot(u, g, Polar()),
        "random": gauss(g.shape, 7),
        "random and short": 1e-3 * gauss(g.shape, 8),
        "against": -lgm.gram(u, g).direction,
        "raw": Polar()(g),
        "zero": torch.zeros_like(g),
        "huge": 1e20 * gauss(g.shape, 9),
    }


def bounds(u, g):
    """f* from below by a feasible point and from above by a nuclear norm, by plain SVD."""
    best = certified_optimum(u, g)
    a, s = shrunk(u, best.direction), sym(best.multiplier)
    return (g * a).sum().item(), torch.linalg.matrix_norm(g + u @ s, "nuc").item()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bracket_holds_whatever_the_direction(shape, make):
    u, g = frame(shape), make(shape).double()
    lower, upper = bounds(u, g)
    slack = 1e-9 * upper
    for name, a in directions(u, g).items():
        found = certify(u, g, a)
        assert found.dual >= lower - slack, name
        assert found.primal <= upper + slack, name
        assert found.primal <= found.dual + slack, name
        attained = (g * shrunk(u, a)).sum()
        torch.testing.assert_close(found.primal, attained, rtol=1e-9, atol=slack)
        torch.testing.assert_close(found.norm, torch.linalg.matrix_norm(a.double(), 2))
        torch.testing.assert_close(found.tangency, defect(u, a), rtol=1e-6, atol=1e-12)
        if upper > 1e-6:  # nothing can be gained at a short side of 1 in the span of U
            shortfall = 1 - attained / upper
            # Uphill the loose dual flatters, but a gap above 1 still says uphill.
            assert found.gap >= (shortfall - 1e-9 if attained >= 0 else 1.0), name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 10),
    more=st.integers(0, 15),
    seed=st.integers(0, 10**6),
    rounds=st.integers(0, 6),
    decades=st.floats(0, 8),
)
def test_no_feasible_point_passes_the_dual_bound(n, more, seed, rounds, decades):
    """Weak duality, tried with random tangent matrices and ascents from the best of them."""
    u = frame((n + more, n), seed)
    values = torch.logspace(0, -decades, n, dtype=torch.float64)
    g = gauss((n + more, n), seed).double() * values
    dual = certify(u, g, torch.zeros_like(g), rounds).dual
    for s in range(20):
        push = g if s % 2 else 0
        a = gauss(g.shape, seed + s).double() * 10.0 ** (s % 5 - 2) + push
        a = shrunk(u, polar_svd(a - u @ sym(u.mT @ a)))
        assert (g * a).sum() <= dual * (1 + 1e-9)


def test_more_rounds_never_loosen_it():
    u, g = frame((32, 16)), spike((32, 16)).double()
    duals = [certify(u, g, torch.zeros_like(g), rounds).dual.item() for rounds in range(8)]
    assert duals == sorted(duals, reverse=True)
    assert duals[-1] < duals[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("shape", [(64, 16), (128, 32)])
def test_the_gap_of_lgm_is_tight_at_ratio_four(shape, make, seed):
    u, g = frame(shape, seed).float(), make(shape, seed)
    a = lgm.gram(u, g).direction
    exact = polar_svd(u)
    lower, upper = bounds(exact, g.double())
    attained = (g.double() * shrunk(exact, a)).sum().item()
    gap = certify(u, g, a).gap.item()
    assert gap >= 1 - attained / lower - 1e-6
    assert gap <= 1 - attained / upper + 0.01
    assert gap <= 0.02


@pytest.mark.parametrize("shape", [(24, 24), (48, 16)])
def test_a_batch_is_certified_one_by_one(shape):
    u = torch.stack([frame(shape, s) for s in range(4)]).view(2, 2, *shape)
    g = torch.stack([gauss(shape), spike(shape), rank_one(shape), torch.zeros(shape)])
    g = (g * torch.tensor([1e-30, 1.0, 1e30, 1.0])[:, None, None]).view(2, 2, *shape)
    a = torch.stack([gauss(shape, s) for s in range(4)]).view(2, 2, *shape)
    together = certify(u, g, a)
    assert together.gap.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            alone = certify(u[i, j], g[i, j], a[i, j])
            for x, y in zip((*together, together.gap), (*alone, alone.gap), strict=True):
                torch.testing.assert_close(x[i, j], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", ["gradient", "direction"])
def test_one_broken_matrix_does_not_hide_the_others(place):
    u = torch.stack([frame((24, 16), s) for s in (1, 2)])
    g = torch.stack([gauss((24, 16), s) for s in (1, 2)])
    a = lgm.gram(u.float(), g).direction
    sound = certify(u[1], g[1], a[1]).gap
    (g if place == "gradient" else a)[0, 0, 0] = math.nan
    gap = certify(u, g, a).gap
    assert gap[0].isnan()
    torch.testing.assert_close(gap[1], sound)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_the_gap_has_no_scale(scale):
    u, g = frame((32, 16)), spike((32, 16)).double()
    a = one_shot(u, g, polar_svd)
    base, scaled = certify(u, g, a), certify(u, g * scale, a)
    torch.testing.assert_close(scaled.gap, base.gap)
    torch.testing.assert_close(scaled.dual / scale, base.dual)


def test_nothing_to_gain_is_no_gap():
    u = frame((32, 16))
    found = certify(u, torch.zeros(32, 16), torch.zeros(32, 16))
    assert (found.primal, found.dual, found.gap) == (0, 0, 0)


def test_the_log_reads_stored_weights_and_directions():
    """Wide weights of any radius, and directions at the scale of the norm."""
    manifold, norm = Stiefel(radius=2.5), Spectral()
    for shape in [(64, 16), (16, 64)]:
        weight = manifold.random_point(shape, torch.Generator().manual_seed(1))
        grad = spike(shape)
        for method, gap in (("lgm", 0.02), ("oneshot", 0.15)):
            solver = steepest(norm, manifold, Ladder(method))
            read = solver.inspect(grad, weight, solver(grad, weight).direction)
            assert 0 <= read["gap"] <= gap
            assert read["tangency"] <= 1e-5
            assert 0.95 <= read["norm"] <= 2 / math.sqrt(3) * 1.005


# The published solver.


def of_size(g, size):
    """Root mean square singular value `size`."""
    return g * (size * math.sqrt(g.shape[-1]) / g.norm())


@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("shape", [(48, 32), (96, 64)])
def test_published_settings_fail_at_the_scale_of_language_models(shape, make):
    """The multiplier cannot travel: rms singular value 1e-3 stops 0.3 off the tangent space."""
    u, g = frame(shape).float(), make(shape)
    small = dual_ascent(u, of_size(g, 1e-3), rate=0.01, normalise=False)
    assert defect(u, small) > 0.3
    lucky = dual_ascent(u, of_size(g, 0.3), rate=0.01, normalise=False)
    assert defect(u, lucky) < 0.2 * defect(u, small)


@pytest.mark.parametrize("make", [gauss, spike])
@pytest.mark.parametrize("shape", [(64, 32), (128, 32)])
def test_normalised_dual_ascent_works_at_any_scale(shape, make):
    u, g = frame(shape).float(), make(shape)
    a = dual_ascent(u, g)
    found = certify(u, g, a)
    assert 1 - found.gap > 0.95
    assert found.tangency < 0.05
    assert torch.linalg.matrix_norm(a, 2) <= 1.01
    for size in (1e-20, 1e-3, 1e20):
        torch.testing.assert_close(dual_ascent(u, of_size(g, size)), a, atol=1e-4, rtol=0)
    lgms = certify(u, g, lgm.gram(u, g).direction)
    assert lgms.gap < found.gap + 0.01


def test_published_starts_at_the_polar_factor_of_the_projection():
    u, g = frame((64, 32)), spike((64, 32)).double()
    first = dual_ascent(u, g, steps=1, polar=polar_svd)
    torch.testing.assert_close(first, polar_svd(g - u @ sym(u.mT @ g)), atol=1e-9, rtol=0)


def test_published_takes_a_batch_and_zero():
    u = torch.stack([frame((32, 16), s) for s in range(3)]).float()
    g = torch.stack([gauss((32, 16)), torch.zeros(32, 16), spike((32, 16))])
    together = dual_ascent(u, g, steps=20)
    for i in range(3):
        torch.testing.assert_close(
            dual_ascent(u[i], g[i], steps=20), together[i], atol=1e-4, rtol=0
        )
    assert not together[1].any()


def test_published_costs_what_it_says():
    """But for the first multiplier; over 100 times LGM at 4 : 1."""
    n, ratio, steps = 32, 4, 3
    u, g = frame((ratio * n, n)).float(), gauss((ratio * n, n))
    with FlopCounterMode(display=False) as counter:
        dual_ascent(u, g, steps=steps, polar=Polar(steps=10))
    counted = counter.get_total_flops() / (2 * n**3)
    assert counted == pytest.approx(dual_ascent_products(ratio, steps, 10), rel=0.02)
    assert dual_ascent_products(4, 100, 10) > 100 * lgm.gram_products(4)
