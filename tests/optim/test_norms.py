from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.optim.linalg import inner
from geon.optim.norms import NORMS, Norm, Sign, Spectral
from geon.optim.polar import Polar

NAMES = sorted(NORMS)


def make(name: str) -> Norm:
    return Spectral(polar=Polar(steps=12)) if name == "spectral" else NORMS[name]()


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 24), cols=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_lmo_beats_every_feasible_point_and_attains_the_dual(name, rows, cols, seed):
    norm, grad = make(name), gauss((rows, cols), seed).double()
    best = norm.lmo(grad)
    attained = inner(grad, best).squeeze()
    # 12 polynomial steps leave singular values below 1e-4 of the largest short of 1.
    slack = 1e-3 if name == "spectral" else 1e-9
    assert norm.value(best) <= 1 + slack
    torch.testing.assert_close(attained, norm.dual(grad), rtol=slack, atol=1e-9)
    torch.testing.assert_close(Norm.dual(norm, grad), attained)
    for k in range(5):
        other = gauss((rows, cols), seed + k + 1).double()
        other = other / norm.value(other)
        assert inner(grad, other) <= attained * (1 + slack)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_lmo_is_scale_invariant(name, scale):
    norm, grad = make(name), gauss((12, 6))
    torch.testing.assert_close(norm.lmo(grad * scale), norm.lmo(grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradient_gives_zero(name):
    assert torch.equal(make(name).lmo(torch.zeros(6, 4)), torch.zeros(6, 4))


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_treated_one_by_one(name):
    norm = make(name)
    batch = torch.stack([gauss((10, 6), s) for s in range(3)])
    for verb in (norm.value, norm.dual, partial(Norm.dual, norm), norm.lmo):
        single = torch.stack([verb(x) for x in batch])
        torch.testing.assert_close(verb(batch), single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_init_has_norm_one_and_is_seeded(name, shape):
    norm = make(name)
    first, again = (norm.init(shape, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(norm.value(first), torch.tensor(1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7), (1, 9), (9, 1)])
def test_extent_is_the_length_of_a_full_direction_and_of_none_longer(name, shape):
    norm = make(name)
    assert norm.lmo(gauss(shape)).norm().item() == pytest.approx(norm.extent(shape), rel=1e-3)
    for seed in range(20):
        feasible = gauss(shape, seed)
        assert feasible.norm() / norm.value(feasible) <= norm.extent(shape) * (1 + 1e-5)


@pytest.mark.parametrize("scale", ["rms", "muon", "none"])
def test_extent_follows_the_spectral_scale(scale):
    norm = Spectral(scale, Polar(steps=12))
    for shape in ((24, 6), (6, 24)):
        assert norm.lmo(gauss(shape)).norm().item() == pytest.approx(norm.extent(shape), rel=1e-3)


@pytest.mark.parametrize("name", ["sign", "colnorm", "rownorm"])
def test_reach_is_honest(name):
    """What `reach` calls enough gives the same LMO as the whole matrix."""
    norm, grad = make(name), gauss((12, 8))
    whole = norm.lmo(grad)
    torch.testing.assert_close(norm.lmo(grad[3:7], (12, 8)), whole[3:7])
    if isinstance(norm, Sign):
        torch.testing.assert_close(norm.lmo(grad[:, 2:5], (12, 8)), whole[:, 2:5])


def test_colnorm_gives_each_token_rms_one():
    step = NORMS["colnorm"]().lmo(gauss((50, 16)))
    torch.testing.assert_close(step.square().mean(dim=-1).sqrt(), torch.ones(50))


def test_spectral_scales():
    grad = gauss((32, 8))
    lengths = {
        scale: torch.linalg.matrix_norm(Spectral(scale, Polar(steps=10)).lmo(grad), 2).item()
        for scale in ("rms", "muon", "none")
    }
    assert lengths == pytest.approx({"rms": 2.0, "muon": 2.0, "none": 1.0}, rel=1e-3)
    wide = torch.linalg.matrix_norm(Spectral("muon", Polar(steps=10)).lmo(grad.mT), 2).item()
    assert wide == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="spectral_scale"):
        Spectral(scale="moon")
