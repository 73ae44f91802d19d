"""Named optimizers as norm x manifold: each beside its formula in float64, and its invariants."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import (
    MANIFOLDS,
    NORMS,
    Group,
    HybridOptimizer,
    ParamInfo,
    Polar,
    Role,
    Rule,
    Spectral,
)
from geon.optim.manifolds import FrobeniusSphere, Hypersphere, Oblique, SpectralSphere, Stiefel
from geon.optim.norms import RMS, ColNorm, Frobenius, RowNorm, Sign
from geon.optim.solvers import steepest

ACCURATE = Polar(steps=14)


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(rule, weight, grads, lr):
    """Weights after each step of the real optimizer."""
    param = nn.Parameter(weight.clone())
    info = ParamInfo("w", tuple(weight.shape), Role.HIDDEN)
    optimizer = HybridOptimizer([Group("g", rule, lr, [(info, param)])])
    seen = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        seen.append(param.detach().clone())
    return seen


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_normuon_is_its_paper(shape):
    """arXiv 2510.05491, algorithm 1, by numpy: rows over the root of their running mean square,
    rescaled to the length that the polar factor had."""
    weight, grads = gauss(shape, 1), [gauss(shape, s) for s in range(2, 8)]
    rule = Rule(Spectral("none", ACCURATE), momentum=0.9, decay=0.1, second_moment=0.95)
    seen = train(rule, weight, grads, lr=0.02)
    w, m = weight.double().numpy(), np.zeros(shape)
    v = np.zeros((shape[0], 1))
    for grad, ours in zip(grads, seen, strict=True):
        m = 0.9 * m + 0.1 * grad.double().numpy()
        u, _, vh = np.linalg.svd(m, full_matrices=False)
        o = u @ vh
        v = 0.95 * v + 0.05 * (o**2).mean(axis=1, keepdims=True)
        divided = o / np.sqrt(v)
        w = (1 - 0.02 * 0.1) * w - 0.02 * divided * np.linalg.norm(o) / np.linalg.norm(divided)
        np.testing.assert_allclose(ours.numpy(), w, atol=2e-4)


def test_normuon_keeps_state_of_its_own_and_warms_it_up_at_lr_zero():
    """As the momentum: its weights stay, and a step of zero gradients there changes nothing."""
    rule = Rule(Spectral(), second_moment=0.9)
    param = nn.Parameter(gauss((12, 6)))
    group = Group("g", rule, 0.02, [(ParamInfo("w", (12, 6), Role.HIDDEN), param)])
    optimizer = HybridOptimizer([group])
    assert optimizer.state_tensors()["w.second_moment"].shape[0] == 12
    param.grad = torch.zeros(12, 6)
    optimizer.step()
    assert torch.isfinite(param).all()
    optimizer.set_lr(0.0)
    weight, before = param.detach().clone(), optimizer.state_tensors()["w.second_moment"].clone()
    param.grad = gauss((12, 6))
    optimizer.step()
    assert torch.equal(param, weight)
    squares = Spectral().lmo(gauss((12, 6))).square().mean(dim=-1)
    after = optimizer.state_tensors()["w.second_moment"].clone()
    torch.testing.assert_close(after, 0.9 * before + 0.1 * squares)
    param.grad = torch.zeros(12, 6)
    optimizer.step()
    assert torch.equal(param, weight)
    assert torch.equal(optimizer.state_tensors()["w.second_moment"], after)


def test_hyperspherical_descent_is_a_rotation_by_atan_lr():
    """w <- normalise(w - lr g_T / |g_T|), the great circle, by numpy."""
    sphere = FrobeniusSphere(radius=1.5)
    shape = (10, 6)
    weight = sphere.random_point(shape, torch.Generator().manual_seed(1))
    grads = [gauss(shape, s) for s in range(5)]
    seen = train(Rule(Frobenius(), sphere, momentum=0.0), weight, grads, lr=0.05)
    length = sphere.length(shape)
    w = weight.double().numpy()
    w = w / np.linalg.norm(w)
    for grad, ours in zip(grads, seen, strict=True):
        g = grad.double().numpy()
        g = g - (w * g).sum() * w
        moved = w - 0.05 * g / np.linalg.norm(g)
        angle = math.acos(min(1.0, (w * moved).sum() / np.linalg.norm(moved)))
        assert angle == pytest.approx(math.atan(0.05), rel=1e-6)
        w = moved / np.linalg.norm(moved)
        np.testing.assert_allclose(ours.numpy() / length, w, atol=1e-6)


def test_muonh_steps_are_orthogonal_to_the_weight_and_keep_its_size():
    sphere, shape = FrobeniusSphere(radius=2.0), (32, 8)
    weight = sphere.random_point(shape, torch.Generator().manual_seed(1))
    rule = Rule(Spectral(polar=ACCURATE), sphere, momentum=0.0)
    direction = rule.solve(gauss(shape), weight).direction
    cosine = (direction * weight).sum() / (direction.norm() * weight.norm())
    assert abs(cosine) < 1e-5
    assert Spectral().value(direction).item() <= 1.0 + 1e-4
    moved = rule.move(weight, direction, 0.05)
    assert moved.norm().item() == pytest.approx(sphere.length(shape), rel=1e-6)
    # A polar factor that is free of the weight has full length: lr is then the angle.
    turned = (moved * weight).sum() / (moved.norm() * weight.norm())
    assert math.acos(turned) == pytest.approx(math.atan(0.05), rel=0.02)


def test_signsgd_and_normalised_sgd_are_their_formulas():
    weight, grad = gauss((6, 4), 1), gauss((6, 4), 2)
    (signed,) = train(Rule(Sign(), momentum=0.0), weight, [grad], lr=0.4)
    torch.testing.assert_close(signed, weight - 0.1 * grad.sign())
    (scaled,) = train(Rule(Frobenius(), momentum=0.0), weight, [grad], lr=0.4)
    torch.testing.assert_close(scaled, weight - 0.4 * grad / grad.norm())


PAIRS = [
    (norm, manifold)
    for norm in sorted(NORMS)
    for manifold in sorted(MANIFOLDS)
    if manifold != "euclidean"
]


@pytest.mark.parametrize(("norm_name", "manifold_name"), PAIRS)
def test_every_pair_is_solved_or_refused(norm_name, manifold_name):
    """A solved pair: tangent, norm about 1, scale free, zero for zero, and it descends."""
    norm, manifold = NORMS[norm_name](), MANIFOLDS[manifold_name](radius=1.5)
    try:
        solver = steepest(norm, manifold)
    except UsageError as error:
        assert "no solver" in str(error) and "known:" in str(error)
        return
    shape = (12, 12) if manifold_name == "orthogonal" else (16, 8)
    weight = torch.stack(
        [manifold.random_point(shape, torch.Generator().manual_seed(s)) for s in (1, 2)]
    )
    grad = torch.stack([gauss(shape, 3), torch.zeros(shape)])
    direction = solver(grad, weight).direction
    assert torch.equal(direction[1], torch.zeros(shape))
    d, w = direction[:1], weight[:1]
    assert 0.3 < norm.value(d).item() <= 1.02
    normal = d - manifold.tangent(w, d)
    assert normal.norm() <= 1e-5 * d.norm()
    assert (d * grad[:1]).sum() > 0
    torch.testing.assert_close(
        solver(grad * 1e-20, weight).direction, direction, atol=1e-4, rtol=1e-3
    )
    assert solver.flops(shape) > 0


KNOWN_PAIRS = [
    (Spectral(), Stiefel()),
    (Spectral(), SpectralSphere()),
    (Sign(), Hypersphere()),
    (RMS(), Hypersphere()),
    (RowNorm(), Oblique()),
    (ColNorm(), Oblique()),
    (Sign(), Oblique(axis="columns")),
    (Frobenius(), Stiefel()),
]


@pytest.mark.parametrize(("norm", "manifold"), KNOWN_PAIRS)
def test_weights_stay_on_the_manifold_and_lr_is_about_the_angle(norm, manifold):
    shape = (16, 8)
    weight = manifold.random_point(shape, torch.Generator().manual_seed(1))
    rule = Rule(norm, manifold, momentum=0.5)
    seen = train(rule, weight, [gauss(shape, s) for s in range(10)], lr=0.03)
    for before, after in zip([weight, *seen], seen, strict=False):
        assert manifold.residual(after) < 2e-5
        moved = (after - before).norm() / manifold.length(shape)
        assert 0.3 * 0.03 < moved <= 1.05 * 0.03


def test_refusals_name_the_setting():
    with pytest.raises(UsageError, match="second_moment 0.9.*norm=spectral and manifold=euclidean"):
        Rule(Spectral(), Stiefel(), second_moment=0.9)
    with pytest.raises(UsageError, match="second_moment 1.5 is the fraction kept"):
        Rule(Spectral(), second_moment=1.5)
    with pytest.raises(UsageError, match="weight decay 0.1 on FrobeniusSphere"):
        Rule(Frobenius(), FrobeniusSphere(), decay=0.1)
