"""Directions for pairs of norm and manifold, against certificates that know nothing of them.

Feasible directions bound the optimum from below, dual values from above: <g, a> <= ||g - lam w||_1
and <G, A> <= ||G + normal||_* hold for whatever was done to find either side.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.optim.manifolds import MANIFOLDS, DGram
from geon.optim.manifolds.dgram import zero_diagonal
from geon.optim.manifolds.spectral import top_pair
from geon.optim.polar import Polar, polar_svd
from geon.optim.solvers.dgram import dgram_spectral
from geon.optim.solvers.scalar_dual import scalar_dual
from geon.optim.solvers.sphere import row_tangent_normalised, tangent_normalised, tangent_sign

SCALES = [1e-30, 1e-12, 1e12, 1e30]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spike(shape, seed=0):
    """Spectrum 60 exp(-40 i/n) + 0.2 + 1.6 (1 - i/n): the shape of real momentum."""
    u, s, vh = torch.linalg.svd(gauss(shape, seed), full_matrices=False)
    i = torch.arange(len(s)) / len(s)
    return (u * (60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i))) @ vh


def low_rank(shape, seed=0):
    return gauss((shape[0], 2), seed) @ gauss((2, shape[1]), seed + 1)


def point(name, shape, seed=1):
    manifold = MANIFOLDS[name](radius=1.3)
    w = manifold.random_point(shape, torch.Generator().manual_seed(seed)).double()
    return manifold, manifold.project(w)


def nuclear(x):
    return torch.linalg.matrix_norm(x, "nuc").item()


def spectral(x):
    return torch.linalg.matrix_norm(x, 2).item()


# Frobenius norm on any manifold, row norm on row spheres


@pytest.mark.parametrize("name", sorted(set(MANIFOLDS) - {"euclidean"}))
def test_tangent_normalised_is_steepest(name):
    """Cauchy-Schwarz, with feasible directions drawn from the tangent space."""
    manifold, w = point(name, (6, 6))
    a = tangent_normalised(gauss((6, 6)), w, manifold)
    assert a.norm().item() == pytest.approx(1)
    torch.testing.assert_close(manifold.tangent(w, a), a, atol=1e-12, rtol=0)
    value = (gauss((6, 6)) * a).sum()
    for seed in range(1, 30):
        other = manifold.tangent(w, gauss((6, 6), seed))
        assert (gauss((6, 6)) * other).sum() <= value * other.norm()
    assert value == pytest.approx(manifold.tangent(w, gauss((6, 6))).norm().item())


@pytest.mark.parametrize("name", ["frobenius_sphere", "stiefel", "dgram"])
def test_a_gradient_nearly_normal_still_gives_a_tangent_direction(name):
    """One projection leaves a part 1e-7 of the gradient, as large as the tangent part here."""
    manifold, w = point(name, (12, 6))
    s = gauss((6, 6), 3)
    normal = w @ zero_diagonal(s + s.mT) if name == "dgram" else w
    grad = (normal + 1e-6 * gauss((12, 6))).float()
    a = tangent_normalised(grad, w.float(), manifold)
    assert (manifold.tangent(w, a.double()) - a).norm() < 2e-6


@pytest.mark.parametrize(("name", "dim"), [("oblique", -1), ("oblique_columns", -2)])
def test_vectors_of_a_row_norm_step(name, dim):
    manifold, w = point(name, (9, 7))
    grad = gauss((9, 7))
    grad.select(0 if dim == -1 else 1, 2).zero_()
    a = row_tangent_normalised(grad, w, dim)
    assert (w * a).sum(dim).abs().max() < 1e-12
    lengths = a.norm(dim=dim)
    assert lengths[2] == 0
    torch.testing.assert_close(lengths[lengths > 0], torch.ones(len(lengths) - 1).double())
    # The optimum of each vector: the length of the gradient's part orthogonal to the weight.
    cosine = (w * grad).sum(dim) / w.norm(dim=dim)
    best = (grad.norm(dim=dim).square() - cosine.square()).clamp(min=0).sqrt()
    torch.testing.assert_close((a * grad).sum(dim), best)
    shard = slice(3, 5)
    part = row_tangent_normalised(grad[shard], w[shard]) if dim == -1 else None
    assert part is None or torch.equal(part, a[shard])


# Sign on spheres: a linear programme


def dual_minimum(g, w):
    """Least ||g - lam w||_1: convex and piecewise linear, so least at a breakpoint."""
    points = [x for x in (g / w).tolist() if math.isfinite(x)]
    return min((g - lam * w).abs().sum().item() for lam in [*points, 0.0])


@pytest.mark.parametrize("n", [2, 5, 300])
@pytest.mark.parametrize("seed", range(4))
def test_tangent_sign_closes_the_duality_gap(n, seed):
    g, w = gauss((1, n), seed), gauss((1, n), seed + 10)
    g = g - 3 * w if seed == 3 else g
    a = tangent_sign(g, w, -1)
    assert a.abs().max() <= 1
    assert (w * a).sum().abs() <= 1e-12 * w.abs().sum()
    upper = dual_minimum(g[0], w[0])
    assert abs(upper - (g * a).sum().item()) <= 1e-10 * upper


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_tangent_sign_by_brute_force_with_ties_and_zeros(pairs, dtype):
    """A linear programme has its optimum at a vertex: all coordinates but one at -1 or 1."""
    g, w = torch.tensor(pairs, dtype=dtype).mT
    a = tangent_sign(g[None], w[None], -1)[0]
    slack = 1e-5 if dtype == torch.float32 else 1e-12
    assert a.abs().max() <= 1
    assert (w * a).sum().abs() <= slack
    best = 0.0
    for loose in range(len(pairs)):
        for signs in itertools.product((-1.0, 1.0), repeat=len(pairs)):
            vertex = torch.tensor(signs, dtype=dtype)
            vertex[loose] = 0
            rest = (w * vertex).sum()
            if w[loose] == 0:
                vertex[loose] = torch.sign(g[loose])
            else:
                vertex[loose] = -rest / w[loose]
            if vertex.abs().max() <= 1 + slack and (w * vertex).sum().abs() <= slack:
                best = max(best, (g * vertex).sum().item())
    assert (g * a).sum().item() == pytest.approx(best, abs=10 * slack)


def test_tangent_sign_along_each_dimension():
    g, w = gauss((3, 6, 5)), gauss((3, 6, 5), 1)
    rows, columns, whole = (tangent_sign(g, w, dim) for dim in (-1, -2, (-2, -1)))
    for b in range(3):
        for i in range(6):
            torch.testing.assert_close(
                rows[b, i], tangent_sign(g[b, i, None], w[b, i, None], -1)[0]
            )
        flat = tangent_sign(g[b].reshape(1, -1), w[b].reshape(1, -1), -1)
        torch.testing.assert_close(whole[b], flat.view(6, 5))
    torch.testing.assert_close(columns, tangent_sign(g.mT, w.mT, -1).mT)
    assert (w * whole).sum((-2, -1)).abs().max() < 1e-12
    assert (w * columns).sum(-2).abs().max() < 1e-12


def test_tangent_sign_shares_ties_and_leaves_zeros():
    """One coordinate with a gradient: the others answer together, in proportion to nothing."""
    a = tangent_sign(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 1, -1, 2]]), -1)
    torch.testing.assert_close(a, torch.tensor([[1.0, -0.25, 0.25, -0.25]]))
    zero = torch.zeros(2, 4)
    assert torch.equal(tangent_sign(zero, torch.ones(2, 4)), zero)
    assert torch.equal(tangent_sign(zero, zero), zero)
    assert torch.equal(tangent_sign(torch.ones(2, 4), zero), torch.ones(2, 4))


def test_tangent_sign_of_a_million_entries_in_float32():
    g, w = gauss((1024, 1024)).float(), gauss((1024, 1024), 1).float()
    a = tangent_sign(g, w).double()
    assert (w * a).sum().abs() / w.abs().sum() < 1e-7
    lam = (g * w).sum() / (w * w).sum()
    assert (g * a).sum() <= (g.double() - lam * w).abs().sum()
    assert (g * a).sum() >= 0.999 * (g.double() - lam * w).abs().sum()


# Spectral norm under one constraint


def least_dual(grad, theta):
    """Least ||G + lam Theta||_* by golden section, in float64."""
    theta = theta / theta.norm() * grad.norm()
    low, high, golden = -64.0, 64.0, (math.sqrt(5) - 1) / 2
    for _ in range(70):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if nuclear(grad + left * theta) < nuclear(grad + right * theta):
            high = right
        else:
            low = left
    return nuclear(grad + low * theta)


def theta_of(name, shape, seed=5):
    w = gauss(shape, seed)
    if name == "weight":
        return w
    if name == "stiefel":
        return polar_svd(w)
    u, v = top_pair(w)
    return u @ v.mT


@pytest.mark.parametrize("theta_name", ["weight", "stiefel", "top pair"])
@pytest.mark.parametrize("make", [gauss, spike, low_rank])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_scalar_dual_is_near_the_certified_optimum(shape, make, theta_name):
    theta = theta_of(theta_name, shape)
    grad = make(shape) + 0.5 * theta
    best, gaps = least_dual(grad, theta), {}
    for evaluations in (4, 6, 8):
        a = scalar_dual(grad, theta, polar_svd, evaluations)
        assert spectral(a) <= 1 + 1e-9
        assert (a * theta).sum().abs() / theta.norm() < 1e-12
        gaps[evaluations] = 1 - (grad * a).sum().item() / best
        assert gaps[evaluations] > -1e-7, "a feasible point above the dual: one of them is wrong"
    assert gaps[4] < 2e-2
    assert gaps[6] < 1e-3
    assert gaps[8] < 1e-4
    # The projection of an unconstrained step, shrunk until it is feasible, is worse.
    raw = polar_svd(grad)
    raw = raw - (raw * theta).sum() / theta.square().sum() * theta
    assert (grad * raw).sum().item() / max(1, spectral(raw)) / best < 1 - gaps[6]


def test_scalar_dual_with_the_weight_in_the_gradient_is_the_same():
    """What is along Theta does not count, even when it is most of the gradient."""
    theta, grad = theta_of("weight", (24, 16)), gauss((24, 16))
    plain, radial = (scalar_dual(grad + c * theta, theta, polar_svd) for c in (0.0, -1000.0))
    torch.testing.assert_close(plain, radial, atol=1e-5, rtol=0)


def test_scalar_dual_of_a_float32_gradient_that_is_nearly_all_weight():
    theta, rest = theta_of("weight", (24, 16)).float(), gauss((24, 16)).float()
    grad = 1e3 * theta + rest
    a = scalar_dual(grad, theta, Polar(steps=12)).double()
    assert (a * theta).sum().abs() / theta.norm() / a.norm() < 1e-6
    best = least_dual(rest.double(), theta.double())
    assert (rest * a).sum().item() / max(1, spectral(a)) / best > 0.999


@pytest.mark.parametrize("evaluations", [1, 2])
def test_scalar_dual_is_feasible_wherever_the_search_stops(evaluations):
    for make in (gauss, spike, low_rank):
        theta = theta_of("stiefel", (24, 24))
        lengths = torch.linspace(0.1, 10, 24, dtype=torch.float64).square()
        for grad in (make((24, 24)), theta * lengths):  # the second has no bracket yet
            a = scalar_dual(grad, theta, polar_svd, evaluations)
            assert (a * theta).sum().abs() / theta.norm() < 1e-12
            assert 0 < spectral(a) <= 1 + 1e-9


@pytest.mark.parametrize("steps", [6, 12])
def test_scalar_dual_with_polynomials_in_float32(steps):
    theta, grad = theta_of("weight", (48, 32)), spike((48, 32))
    a = scalar_dual(grad.float(), theta.float(), Polar(steps=steps)).double()
    assert (a * theta).sum().abs() / theta.norm() / a.norm() < 1e-6
    short = 1 - (grad * a).sum().item() / max(1, spectral(a)) / least_dual(grad, theta)
    assert -1e-6 < short < {6: 4e-3, 12: 1e-3}[steps]
    assert spectral(a) < {6: 1.01, 12: 1.0001}[steps]


# Spectral norm on DGram


def dgram_bound(grad, w):
    """Least ||G + W S||_*, S symmetric with zero diagonal: L-BFGS on a smoothed norm."""
    start = DGram().tangent(w, grad)
    scale = start.norm() / math.sqrt(w.shape[1])
    free = torch.zeros(w.shape[1], w.shape[1], dtype=w.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=80, history_size=20, line_search_fn="strong_wolfe"
    )
    for mu in (1e-1, 1e-2, 1e-3):

        def closure(mu=mu):
            optimizer.zero_grad()
            s = zero_diagonal(free + free.mT)
            values = torch.linalg.svdvals(start / scale + w @ s)
            loss = (values.square() + mu * mu).sqrt().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return nuclear(start + scale * w @ zero_diagonal(free + free.mT).detach())


@pytest.mark.parametrize("make", [gauss, spike, low_rank])
@pytest.mark.parametrize("shape", [(24, 24), (36, 24), (48, 16)])
def test_dgram_descends_at_least_85_percent_of_the_bound(shape, make):
    _, w = point("dgram", shape)
    grad = make(shape)
    bound, reached = dgram_bound(grad, w), {}
    for rounds in (0, 3, 10):
        a = dgram_spectral(grad, w, polar_svd, rounds)
        gram = zero_diagonal(w.mT @ a + a.mT @ w)
        assert gram.abs().max() < 1e-12
        assert spectral(a) <= 1.01
        reached[rounds] = (grad * a).sum().item() / max(1, spectral(a)) / bound
        assert reached[rounds] <= 1 + 1e-9
    assert reached[3] > 0.85
    assert reached[10] > 0.92
    assert reached[0] < reached[3] < reached[10]
    wide = dgram_spectral(grad.mT, w.mT, polar_svd)
    if shape[0] != shape[1]:
        torch.testing.assert_close(wide, dgram_spectral(grad, w, polar_svd).mT)


# What all of them promise

POLAR = Polar(steps=8)
SOLVERS = {
    "tangent_normalised": ("stiefel", lambda g, w, m: tangent_normalised(g, w, m)),
    "rows": ("oblique", lambda g, w, m: row_tangent_normalised(g, w, -1)),
    "columns": ("oblique_columns", lambda g, w, m: row_tangent_normalised(g, w, -2)),
    "sign": ("hypersphere", lambda g, w, m: tangent_sign(g, w)),
    "sign of rows": ("oblique", lambda g, w, m: tangent_sign(g, w, -1)),
    "sign of columns": ("oblique_columns", lambda g, w, m: tangent_sign(g, w, -2)),
    "frobenius sphere": ("frobenius_sphere", lambda g, w, m: scalar_dual(g, w, POLAR)),
    "spectral sphere": (
        "spectral_sphere",
        lambda g, w, m: scalar_dual(g, (lambda u, v: u @ v.mT)(*top_pair(w)), POLAR),
    ),
    "dgram": ("dgram", lambda g, w, m: dgram_spectral(g, w, POLAR.of_scaled)),
}
every_solver = pytest.mark.parametrize("solver", list(SOLVERS))


def setting(solver, count=3):
    name, solve = SOLVERS[solver]
    manifold = MANIFOLDS[name](radius=1.3)
    shapes = torch.stack([point(name, (16, 10), s)[1] for s in range(count)]).float()
    grads = torch.stack([spike((16, 10), s) for s in range(count)]).float()
    return lambda g, w: solve(g, w, manifold), grads, shapes


@every_solver
def test_scale_of_the_gradient_does_not_matter(solver):
    solve, grads, weights = setting(solver)
    expected = solve(grads, weights)
    for scale in SCALES:
        torch.testing.assert_close(solve(grads * scale, weights), expected, atol=2e-3, rtol=0)
    powers = solve(grads * 2.0**-90, weights)  # no rounding in the scale, hence none in the result
    torch.testing.assert_close(powers, expected, atol=1e-6, rtol=0)


@every_solver
def test_zero_gradients_give_zero_and_do_not_touch_their_neighbours(solver):
    solve, grads, weights = setting(solver)
    grads[1] = 0
    mixed = solve(grads, weights)
    assert torch.equal(mixed[1], torch.zeros(16, 10))
    for i in (0, 2):
        single = solve(grads[i], weights[i])
        torch.testing.assert_close(mixed[i], single, atol=1e-4, rtol=0)
        assert single.isfinite().all()


@every_solver
def test_zero_gradients_of_wide_heads_give_zero(solver):
    """What depends on the width must not overflow beside a norm of zero."""
    name, solve = SOLVERS[solver]
    manifold = MANIFOLDS[name](radius=1.3)
    weight = point(name, (128, 64))[1].float()
    assert torch.equal(solve(torch.zeros(128, 64), weight, manifold), torch.zeros(128, 64))


@every_solver
def test_hard_gradients_never_give_nan(solver):
    solve, _, weights = setting(solver)
    one_hot, equal = torch.zeros_like(weights), torch.ones_like(weights)
    one_hot[:, 3, 2] = 1e-38
    for grads in (one_hot, equal, weights, -weights, 1e30 * low_rank((16, 10)).float() + 0 * equal):
        direction = solve(grads, weights)
        assert direction.isfinite().all()
        assert direction.dtype == torch.float32
        assert (direction * grads.sign()).abs().max() < 1.5
    assert solve(one_hot, torch.zeros_like(weights)).isfinite().all()


@every_solver
def test_no_solver_waits_for_the_device(solver):
    """Meta tensors have no values: a branch on one raises."""
    name, solve = SOLVERS[solver]
    x = torch.empty(2, 8, 6, device="meta")
    assert solve(x, x, MANIFOLDS[name](radius=1.0)).shape == x.shape
