"""Every manifold of the table against the promises of its base class.

A new manifold is tested by adding its name (and dimension) here.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from geon.optim.manifolds import MANIFOLDS, Oblique, SpectralSphere, Sphere, Stiefel

NAMES = sorted(MANIFOLDS)
CONSTRAINED = [name for name in NAMES if name != "euclidean"]
SHAPES = [(12, 5), (5, 12), (7, 7)]
# All points have one Frobenius norm.
CONSTANT_LENGTH = {
    "frobenius_sphere",
    "hypersphere",
    "oblique",
    "oblique_columns",
    "orthogonal",
    "stiefel",
}
# Dimension of the set of m x n matrices, m >= n or not, short side s.
DIMENSION = {
    "dgram": lambda m, n, s: m * n - s * (s - 1) // 2,
    "euclidean": lambda m, n, s: m * n,
    "frobenius_sphere": lambda m, n, s: m * n - 1,
    "hypersphere": lambda m, n, s: m * n - 1,
    "oblique": lambda m, n, s: m * n - m,
    "oblique_columns": lambda m, n, s: m * n - n,
    "orthogonal": lambda m, n, s: m * n - s * (s + 1) // 2,
    "spectral_ball": lambda m, n, s: m * n,
    "spectral_sphere": lambda m, n, s: m * n - 1,
    "stiefel": lambda m, n, s: m * n - s * (s + 1) // 2,
}
CASES = [
    (name, shape) for name in NAMES for shape in SHAPES if name != "orthogonal" or shape == (7, 7)
]
every_case = pytest.mark.parametrize(("name", "shape"), CASES)


def make(name, radius=1.7):
    return MANIFOLDS[name]() if name == "euclidean" else MANIFOLDS[name](radius=radius)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gauss(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def point(manifold, shape, seed=1):
    """On the manifold to float64."""
    return manifold.project(manifold.random_point(shape, seeded(seed)).double())


def starting(name, manifold, shape, seed=1):
    """As long as `length` says: points that differ in it start with all singular values equal."""
    if name in ("dgram", "spectral_ball"):
        manifold = Stiefel(manifold.radius)
    return manifold.random_point(shape, seeded(seed))


def unit_tangent(manifold, w, seed=2):
    """Tangent vector as long as the weight."""
    v = manifold.tangent(w, gauss(w.shape, seed))
    return v * (w.norm() / v.norm())


def test_every_manifold_is_tested():
    assert set(DIMENSION) == set(NAMES)


@every_case
def test_drawn_points_are_on_the_manifold_seeded_and_as_long_as_promised(name, shape):
    manifold = make(name)
    first, again = (manifold.random_point(shape, seeded(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert manifold.residual(first) < 3e-6
    if name in CONSTANT_LENGTH:
        assert first.norm().item() == pytest.approx(manifold.length(shape), rel=1e-5)
    start = starting(name, manifold, shape)
    assert manifold.residual(start) < 3e-6
    if name in ("dgram", "spectral_ball"):
        assert start.norm().item() == pytest.approx(manifold.length(shape), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (5, 5), (30, 10), (20, 60)])
def test_length_of_the_starts_that_vary(shape):
    for manifold in (SpectralSphere(0.5), MANIFOLDS["euclidean"]()):
        lengths = [manifold.random_point(shape, seeded(s)).norm().item() for s in range(300)]
        tolerance = 0.03 if isinstance(manifold, SpectralSphere) else 0.3
        assert sum(lengths) / 300 == pytest.approx(manifold.length(shape), rel=tolerance)


class Ops(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@every_case
@pytest.mark.parametrize("scale", [0.3, 0.9, 1.0, 1.01, 3.0])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_distance_is_the_residual_from_products_alone(name, shape, scale, noise):
    """In fp32 and in batches, as an optimizer asks before its first step."""
    manifold = make(name)
    points = [manifold.random_point(shape, seeded(s)) for s in range(5)]
    w = (
        torch.stack(
            [
                p
                + noise
                * p.norm()
                / math.sqrt(p.numel())
                * torch.randn(shape, generator=seeded(10 + s))
                for s, p in enumerate(points)
            ]
        )
        * scale
    )
    with Ops() as ops:
        found = manifold.distance(w)
    assert found.shape == (5,)
    torch.testing.assert_close(found, manifold.residual(w), rtol=0.03, atol=1e-5)
    assert not [name for name in ops.names if "svd" in name or "eig" in name]
    if name != "euclidean" and scale == 1.0 and noise == 0.0:
        assert found.max() < 1e-5
    if name in CONSTANT_LENGTH and scale != 1.0 and noise == 0.0:
        assert found.min() > 0.9 * abs(scale - 1.0)


def test_residual_is_relative():
    """The same relative error gives the same residual whatever the radius."""
    for name in CONSTRAINED:
        residuals = []
        for radius in (1e-3, 1.0, 1e3):
            manifold = make(name, radius)
            w = point(manifold, (6, 6))
            residuals.append(manifold.residual(1.01 * w + 0.02 * w.abs().mean() * gauss((6, 6))))
        assert min(residuals) > 1e-3
        torch.testing.assert_close(residuals[0], residuals[1])
        torch.testing.assert_close(residuals[2], residuals[1])


@every_case
def test_tangent_is_the_orthogonal_projection_on_a_space_of_the_right_dimension(name, shape):
    manifold, size = make(name), shape[0] * shape[1]
    w = point(manifold, shape).expand(size, *shape)
    basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
    matrix = manifold.tangent(w, basis).reshape(size, size)
    torch.testing.assert_close(matrix @ matrix, matrix, atol=1e-10, rtol=0)
    torch.testing.assert_close(matrix, matrix.mT, atol=1e-10, rtol=0)
    assert matrix.trace().item() == pytest.approx(DIMENSION[name](*shape, min(shape)), abs=1e-8)


@every_case
def test_retraction_follows_tangent_vectors_to_first_order(name, shape):
    manifold = make(name)
    w = point(manifold, shape) * (0.9 if name == "spectral_ball" else 1.0)
    v = unit_tangent(manifold, w)
    coarse, fine = ((manifold.retract(w + t * v) - w - t * v).norm() for t in (1e-3, 1e-4))
    assert fine <= coarse / 80 + 1e-12 * w.norm()
    if name not in ("euclidean", "spectral_ball"):
        off = manifold.retract(w + 1e-3 * w.norm() * gauss(shape) / 10)
        normal = (off - w - 1e-4 * w.norm() * gauss(shape)).norm()
        assert normal > 10 * coarse, "a vector that is not tangent must not be followed"


@every_case
@pytest.mark.parametrize("angle", [0.05, 0.2])
def test_steps_end_on_the_manifold(name, shape, angle):
    """To within the fourth power of the angle that Newton-Schulz leaves."""
    manifold, (tolerance, steps) = make(name), {0.05: (2e-4, 30), 0.2: (2e-3, 8)}[angle]
    w = starting(name, manifold, shape)
    for seed in range(steps):
        v = manifold.tangent(w, gauss(shape, seed).float())
        v = v * (manifold.length(shape) / v.norm())
        before, w = w, manifold.retract(w - angle * v, angle=angle)
        assert manifold.residual(w) < tolerance
        if name != "spectral_ball":  # it cuts steps off
            turned = (w - before).norm() / manifold.length(shape)
            assert turned == pytest.approx(angle, rel=0.3)


@every_case
def test_retraction_leaves_points_alone(name, shape):
    manifold = make(name)
    w = start = manifold.random_point(shape, seeded(1))
    for _ in range(20):
        w = manifold.retract(w)
    torch.testing.assert_close(w, start, atol=2e-6 * start.norm().item(), rtol=0)


@every_case
def test_projection_is_idempotent_and_nearer_than_other_points(name, shape):
    manifold, w = make(name), gauss(shape, 7)
    nearest = manifold.project(w)
    assert manifold.residual(nearest) < 1e-9
    torch.testing.assert_close(manifold.project(nearest), nearest)
    distance = (nearest - w).norm()
    for seed in range(30):
        other = manifold.random_point(shape, seeded(seed)).double()
        assert (other - w).norm() >= distance * (1 - 1e-6)
        if name != "dgram":  # that one says that it is only near
            step = 0.03 * unit_tangent(manifold, nearest, seed)
            close = manifold.project(nearest + step)
            assert (close - w).norm() >= distance * (1 - 1e-9)


@every_case
def test_removes_decay_is_honest(name, shape):
    """Shrinking the weight by a is undone to first order in a, or it is not."""
    manifold = make(name)
    w = point(manifold, shape)
    moved = (manifold.retract((1 - 1e-3) * w) - w).norm() / w.norm()
    assert moved < 1e-5 if manifold.removes_decay else moved > 1e-4
    normal = manifold.tangent(w, w).norm() / w.norm() < 1e-9
    assert normal == (manifold.removes_decay and name != "spectral_sphere")


@every_case
def test_batches_are_treated_one_by_one(name, shape):
    manifold = make(name)
    w = torch.stack([manifold.random_point(shape, seeded(s)) for s in range(3)])
    v = torch.stack([gauss(shape, s + 5).float() for s in range(3)])
    for verb in (manifold.retract, manifold.residual, manifold.project):
        single = torch.stack([verb(x) for x in w + 0.01 * v])
        torch.testing.assert_close(verb(w + 0.01 * v), single, rtol=1e-4, atol=1e-5)
    single = torch.stack([manifold.tangent(x, y) for x, y in zip(w, v, strict=True)])
    torch.testing.assert_close(manifold.tangent(w, v), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "spectral_ball"])
def test_verbs_of_a_step_never_wait_for_the_device(name):
    """Meta tensors have no values: a branch on one raises. The ball waits instead of capping."""
    w = torch.empty(2, 6, 6, device="meta")
    assert make(name).retract(w, angle=0.1).shape == w.shape
    assert make(name).tangent(w, w).shape == w.shape


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_any_shape_will_do(name, rows, cols, seed):
    shape = (rows, rows) if name == "orthogonal" else (rows, cols)
    manifold = make(name)
    w = manifold.random_point(shape, seeded(seed))
    assert manifold.residual(w) < 1e-5
    v = manifold.tangent(w, gauss(shape, seed + 1).float())
    torch.testing.assert_close(manifold.tangent(w, v), v, atol=1e-5 * math.sqrt(w.numel()), rtol=0)
    moved = manifold.retract(w - 0.01 * v / v.norm().clamp(min=1e-6) * w.norm())
    assert moved.isfinite().all()
    assert manifold.residual(moved) < 1e-3
    assert 0 < manifold.length(shape) < math.inf


@pytest.mark.parametrize("name", [name for name in CONSTRAINED if name != "spectral_ball"])
def test_points_without_a_nearest_one_are_refused(name):
    manifold = make(name)
    with pytest.raises(ValueError, match="manifold=euclidean"):
        manifold.project(torch.zeros(4, 4))


def test_refusals_say_why():
    for name in CONSTRAINED:
        with pytest.raises(ValueError, match=r"must be positive, got 0"):
            make(name, 0.0)
    with pytest.raises(ValueError, match=r"\(6, 4\) is not square.*manifold=stiefel"):
        make("orthogonal").random_point((6, 4), seeded(0))
    with pytest.raises(ValueError, match="'diagonals' of the oblique manifold"):
        Oblique(axis="diagonals")
    w = torch.ones(4, 3)
    w[2] = 0
    with pytest.raises(ValueError, match="1 zero row"):
        make("oblique").project(w)
    assert make("oblique_columns").residual(make("oblique_columns").project(w)) < 1e-6


def test_scales_of_the_spheres():
    """RMS of the entries, RMS of rows and columns, and Stiefel points on the Frobenius sphere."""
    entries = make("hypersphere", 0.3).random_point((8, 5), seeded(0))
    assert entries.square().mean().sqrt().item() == pytest.approx(0.3)
    rows = make("oblique", 0.3).random_point((8, 5), seeded(0))
    torch.testing.assert_close(rows.square().mean(dim=1).sqrt(), torch.full((8,), 0.3))
    columns = make("oblique_columns", 0.3).random_point((8, 5), seeded(0))
    torch.testing.assert_close(columns.square().mean(dim=0).sqrt(), torch.full((5,), 0.3))
    sphere = make("frobenius_sphere", 0.3)
    assert isinstance(sphere, Sphere)
    assert sphere.residual(Stiefel(0.3).random_point((8, 5), seeded(0))) < 1e-6
    assert (
        make("spectral_sphere", 0.3).residual(Stiefel(0.3).random_point((5, 8), seeded(0))) < 1e-6
    )


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_dgram_tangents_at_columns_of_zero(shape):
    """They lose what is along the other columns; between two of them nothing is asked."""
    manifold, v = make("dgram"), gauss(shape, 2).float()
    w = point(manifold, shape).float()
    tall = (lambda x: x) if shape[0] > shape[1] else (lambda x: x.mT)
    tall(w)[:, :2] = 0
    found = tall(manifold.tangent(w, v))
    gram = tall(w).mT @ found + found.mT @ tall(w)
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-5
    others, given = tall(w)[:, 2:].double(), tall(v)[:, :2].double()
    along = others @ ((others.mT @ given) / others.square().sum(0)[:, None])
    torch.testing.assert_close(found[:, :2], (given - along).float(), atol=1e-5, rtol=0)
