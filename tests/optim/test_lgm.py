"""LGM, Manifold Muon's direction: feasible always, near the optimum, without scale or frame."""

from statistics import median

import pytest
import torch

from geon.optim import Polar, Rule, Spectral, Stiefel, polar_svd
from geon.optim.linalg import Precision, orient
from geon.optim.manifolds import stiefel
from geon.optim.solvers import Ladder, lgm, stiefel_spectral
from tests.optim.problems import (
    BF16,
    FORMS,
    LEAST_TANGENT,
    LONGEST,
    NORMAL,
    SCALES,
    SHAPES,
    SPECTRA,
    STIEFEL,
    gauss,
    of_rank,
    point,
    rho,
    skew,
    solve,
    spectral_norm,
    spike,
    sym,
    tangency,
)

# Feasibility.


def feasible(form, spectrum, shape, seed, refine=0, may_fall_back=False):
    """A batch of five scales."""
    weight, grad = point(shape, seed), {**SPECTRA, **NORMAL}[spectrum](shape, seed)
    grads = torch.stack([grad * scale for scale in SCALES])
    found = solve(form, grads, weight.expand_as(grads), refine)
    a, where = found.direction, f"{form}, {spectrum}, {shape}, seed {seed}"
    assert a.isfinite().all(), where
    defect, size = tangency(STIEFEL.unit(weight), a), spectral_norm(a)
    assert (defect <= LEAST_TANGENT[form]).all(), (where, defect)
    assert (size <= LONGEST["oneshot" if may_fall_back else form]).all(), (where, size)
    assert may_fall_back or found.fell_back is None or not found.fell_back.any(), where


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("spectrum", [*SPECTRA, *NORMAL])
@pytest.mark.parametrize("form", ["gram", "rect"])
def test_feasible_in_fp32(form, spectrum, refine):
    """The rectangular form gets nothing but rounding from a normal gradient, and may fall back."""
    for shape in SHAPES:
        for seed in (1, 2):
            feasible(form, spectrum, shape, seed, refine, form == "rect" and "normal" in spectrum)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_feasible_with_bf16x3_products(spectrum):
    for shape in SHAPES:
        for seed in (1, 2):
            feasible("gram x3", spectrum, shape, seed)


@pytest.mark.parametrize("spectrum", NORMAL)
def test_bf16x3_survives_gradients_with_little_across(spectrum):
    """In small matrices the rounding of G^T G - B^T B does not average out."""
    for shape in [(3, 2), (4, 3), (5, 4), (8, 1), (10, 2), (16, 8), (64, 32)]:
        for seed in range(20):
            feasible("gram x3", spectrum, shape, seed)


@pytest.mark.parametrize("form", ["rect bf16", "rect bf16 x3"])
@pytest.mark.parametrize("spectrum", [*SPECTRA, *NORMAL])
def test_feasible_with_bf16_polar_factors(spectrum, form):
    for shape in SHAPES:
        feasible(form, spectrum, shape, 1, may_fall_back="normal" in spectrum)


@pytest.mark.parametrize("spectrum", [*SPECTRA, *NORMAL])
def test_one_shot_is_feasible(spectrum):
    for shape in SHAPES:
        feasible("oneshot", spectrum, shape, 1)


@pytest.mark.parametrize("form", ["gram", "rect"])
def test_on_squares_the_general_solver_is_feasible_too(form):
    """The ladder never asks it, but the part across U is then pure rounding: the worst case."""
    call = getattr(lgm, {"gram": "gram", "rect": "rectangular"}[form])
    for spectrum, make in {**SPECTRA, **NORMAL}.items():
        for shape in [(32, 32), (33, 33), (2, 2), (1, 1)]:
            u, g = point(shape, 3), make(shape, 3)
            a = call(u, g).direction
            assert tangency(u, a) <= 1e-5, (spectrum, shape)
            assert spectral_norm(a) <= LONGEST["oneshot"], (spectrum, shape)


# Share of the optimum.

RATIOS = [(32, 32), (34, 32), (40, 32), (48, 32), (64, 32), (96, 32), (128, 32), (128, 16)]
RATIOS += [(16, 256)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", RATIOS)
def test_at_least_97_percent_of_the_optimum(shape, spectrum):
    for form in ("gram", "gram x3", "rect"):
        assert rho(form, spectrum, shape) >= 0.97, form


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spectrum", ["gauss", "spike"])
@pytest.mark.parametrize("shape", [(128, 32), (32, 128), (256, 64)])
def test_at_least_99_percent_at_ratio_four(shape, spectrum, seed):
    assert rho("gram", spectrum, shape, seed) >= 0.99
    assert rho("rect", spectrum, shape, seed) >= 0.99
    for form in ("rect bf16", "rect bf16 x3"):  # the second is what a GPU takes
        assert rho(form, spectrum, shape, seed) >= 0.99
    assert rho("gram", spectrum, shape, seed) > rho("oneshot", spectrum, shape, seed)


@pytest.mark.parametrize("ratio", [2, 3, 4, 8, 16])
def test_a_refinement_helps(ratio):
    gains = [
        rho("gram", "spike", shape, seed, refine=1) - rho("gram", "spike", shape, seed)
        for shape in [(32 * ratio, 32), (16, 16 * ratio)]
        for seed in range(3)
    ]
    assert min(gains) >= -0.003
    assert median(gains) > 0


@pytest.mark.parametrize("spectrum", ["gauss", "spike", "decay 1e-4"])
@pytest.mark.parametrize("n", [33, 64, 128])
def test_squares_end_within_1e_6_of_the_optimum(n, spectrum):
    """Known here: the nuclear norm of skew(U^T G)."""
    weight, grad = point((n, n)), SPECTRA[spectrum]((n, n), 1)
    u, g = polar_svd(weight), grad.double()
    a = solve("gram", grad, weight).direction.double()
    a = a - u @ sym(u.mT @ a)
    attained = (g * a).sum() / spectral_norm(a).clamp_min(1.0)
    gap = 1 - attained / torch.linalg.matrix_norm(skew(u.mT @ g), "nuc")
    assert -1e-9 <= gap <= 1e-6


# Symmetries.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (128, 32), (16, 256), (1, 1)])
def test_direction_has_no_scale(shape, form):
    """Bitwise for powers of two; others round the gradient, and near r = 1 Grams amplify that."""
    tol = {"gram x3": 2e-3, "rect bf16": 2e-2, "rect bf16 x3": 2e-2}.get(form, 1e-4)
    tol = 1e-3 if (form, shape) == ("gram", (48, 32)) else tol
    weight, grad = point(shape), gauss(shape, 1)
    a = solve(form, grad, weight).direction
    for power in (-90, -1, 90):
        assert torch.equal(solve(form, grad * 2.0**power, weight).direction, a)
    for power in (-30, -5, 3, 30):
        b = solve(form, grad * 10.0**power, weight).direction
        torch.testing.assert_close(b, a, atol=tol, rtol=0)


@pytest.mark.parametrize("form", ["gram", "rect", "oneshot"])
@pytest.mark.parametrize("spectrum", ["gauss", "spike"])
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (128, 32), (32, 96), (16, 256)])
def test_rotating_weight_and_gradient_rotates_the_direction(shape, spectrum, form):
    weight, grad = point(shape), SPECTRA[spectrum](shape, 1)
    left, right = point((shape[0],) * 2, 7), point((shape[1],) * 2, 8)
    rotated = solve(form, left @ grad @ right, left @ weight @ right).direction
    straight = solve(form, grad, weight).direction
    wide = shape[0] < shape[1]
    wanted = left @ (straight.mT if wide else straight) @ right
    rotated = rotated.mT if wide else rotated
    torch.testing.assert_close(rotated, wanted, atol=1e-3 if form == "gram" else 1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(32, 32), (40, 32), (128, 32), (16, 64), (8, 1)])
def test_a_batch_is_solved_one_by_one(shape, form):
    weights = torch.stack([point(shape, s) for s in range(4)])
    makes = [gauss, spike, of_rank(1), gauss]
    grads = torch.stack([make(shape, s) * 10.0 ** (3 * s) for s, make in enumerate(makes)])
    grads[3] = 0
    together, tol = solve(form, grads, weights).direction, 2e-2 if "bf16" in form else 1e-3
    assert not together[3].any()
    for a, grad, weight in zip(together, grads, weights, strict=True):
        torch.testing.assert_close(solve(form, grad, weight).direction, a, atol=tol, rtol=0)
    nested = solve(form, grads.view(2, 2, *shape), weights.view(2, 2, *shape))
    torch.testing.assert_close(nested.direction.flatten(0, 1), together, atol=tol, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(48, 32), (128, 32), (8, 1)])
def test_wide_is_the_transpose_of_tall(shape, form):
    weight, grad = point(shape), gauss(shape, 1)
    wide = weight.mT * (STIEFEL.scale(shape[::-1]) / STIEFEL.scale(shape))
    a, b = solve(form, grad, weight).direction, solve(form, grad.mT, wide).direction
    torch.testing.assert_close(a, b, atol=2e-2 if "bf16" in form else 2e-3, rtol=0)


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("lr", [0.02, 0.2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (16, 64), (5, 1)])
def test_no_gradient_no_step(shape, form, lr, refine):
    """Zero to the bit, alone and in a batch; and then the weight keeps its bits."""
    weights = torch.stack([point(shape, s) for s in (1, 2)])
    grads = torch.stack([torch.zeros(shape), gauss(shape)])
    ladder = FORMS[form]
    ladder = Ladder(ladder.method, refine, ladder.form, ladder.precision)
    rule = Rule(Spectral(polar=BF16 if "bf16" in form else Polar()), STIEFEL, ladder=ladder)
    found = rule.solve(grads, weights)
    assert found.fell_back is None or not found.fell_back.any()
    assert torch.equal(found.direction[0], torch.zeros(shape))
    alone = rule.solve(grads[0], weights[0]).direction
    assert torch.equal(alone, torch.zeros(shape))
    moved = rule.move(weights, found.direction, lr)
    assert torch.equal(moved[0], weights[0])
    assert shape == (5, 1) or not torch.equal(moved[1], weights[1])
    assert torch.equal(rule.move(weights[0], alone, lr), weights[0])


@pytest.mark.parametrize("defect", [1e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("shape", [(12, 8), (64, 32), (128, 96)])
def test_a_weight_off_the_manifold_gets_no_wild_direction(shape, defect):
    """As in bf16, whose defect is 4e-3: C must not take U^T U for the identity."""
    manifold = Stiefel()
    rule = Rule(Spectral(), manifold)
    for seed in range(10):
        weight, noise = manifold.project(gauss(shape, seed)), gauss(shape, 100 + seed)
        each = float(manifold.residual(weight + 1e-3 * noise)) / 1e-3
        weight = weight + noise * (defect / each)
        off = float(manifold.residual(weight))
        assert 0.5 * defect <= off <= 1.5 * defect
        for grad in (gauss(shape, 200 + seed), of_rank(3)(shape, seed) + 0.01 * noise):
            direction = rule.solve(grad, weight).direction / rule.norm.factor(shape)
            assert spectral_norm(direction) <= 1.001 + min(0.3, 60 * off)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_the_arithmetic_of_a_gpu_keeps_the_manifold(shape, monkeypatch):
    """bf16x3 and bf16 products, emulated; 300 noisy steps, seen in float64."""
    for module in (stiefel, stiefel_spectral):
        monkeypatch.setattr(module, "accurate_on", lambda device: Precision.BF16X3)
    rule = Rule(Spectral(polar=BF16), STIEFEL, ladder=Ladder(form="rect"))
    weight, generator = point(shape)[None], torch.Generator().manual_seed(0)
    for step in range(300):
        grad = torch.randn(1, *shape, generator=generator) * 1e-3
        before = weight
        weight = rule.step(grad, weight, 0.03, shape).result
        if step % 100 == 0:
            direction = orient(rule.solve(grad, before).direction) / rule.norm.factor(shape)
            assert tangency(STIEFEL.unit(before)[0], direction[0]) <= 1e-5
    assert not torch.equal(weight[0], point(shape))
    assert STIEFEL.residual(weight.double()).item() <= 1e-5
