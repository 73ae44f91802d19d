import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from geon.optim.linalg import Precision
from geon.optim.polar import (
    CUBIC,
    TABLES,
    Polar,
    bounds,
    inverse_sqrt,
    minimax,
    polar,
    polar_svd,
    steps_for,
)
from tests.optim.test_polar_gram import polar_gram

SHAPES = [(64, 64), (128, 32), (32, 128), (65, 33), (1, 7), (7, 1), (1, 1)]
FP32_LIKE = [None, Precision.FP32, Precision.BF16X3]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm2(x):
    return torch.linalg.matrix_norm(x.double(), 2).item()


def spread(x):
    return (torch.linalg.svdvals(x.double()) - 1).abs().max().item()


def test_svd_reference_has_unit_singular_values_and_aligns():
    g = gauss((20, 12)).double()
    u = polar_svd(g)
    torch.testing.assert_close(u.mT @ u, torch.eye(12, dtype=torch.float64))
    assert torch.isclose((u * g).sum(), torch.linalg.svdvals(g).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_steps_agree_with_svd_on_well_conditioned(shape):
    g = gauss(shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    g = (u * (0.1 + s / s.max())) @ vh
    assert (polar(g, steps=10) - polar_svd(g).float()).abs().max() < 5e-6


@pytest.mark.parametrize("function", [polar, polar_gram])
@pytest.mark.parametrize("shape", [(96, 24), (24, 96)])
@pytest.mark.parametrize("exponent", [-30, -12, -3, 0, 3, 12, 30])
def test_scale_does_not_matter(exponent, shape, function):
    g = gauss(shape)
    torch.testing.assert_close(function(g * 10.0**exponent), function(g), atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", [None, Precision.BF16])
def test_matrices_about_one_in_size_need_no_largest_entry(precision):
    """One reduction less: the same factors to rounding."""
    solver, rounding = Polar(precision=precision), 2e-6 if precision is None else 2e-2
    for size in (1e-4, 1.0, 1e4):
        batch = torch.stack([size * gauss((24, 12)), torch.zeros(24, 12)])
        found = solver.of_scaled(batch)
        torch.testing.assert_close(found, solver(batch), atol=rounding, rtol=0)
        assert not found[1].any()


@pytest.mark.parametrize("precision", [None, *Precision])
def test_zero_in_zero_out_beside_others(precision):
    batch = torch.stack([gauss((8, 4)), torch.zeros(8, 4)])
    outs = [polar(batch, precision=precision)]
    if precision is not Precision.BF16:
        outs.append(polar_gram(batch, precision=precision))
        outs.append(inverse_sqrt(batch.mT @ batch, precision=precision))
    for out in outs:
        assert torch.equal(out[1], torch.zeros_like(out[1]))
        assert torch.isfinite(out).all() and norm2(out[0]) > 0.1


@pytest.mark.parametrize("precision", FP32_LIKE)
@pytest.mark.parametrize("function", [polar, polar_gram, inverse_sqrt])
def test_batched_equals_one_by_one(function, precision):
    batch = torch.stack([gauss((48, 16), seed) for seed in range(6)])
    batch = batch.mT @ batch if function is inverse_sqrt else batch
    single = torch.stack([function(g, precision=precision) for g in batch])
    atol = 1e-4 if precision is Precision.BF16X3 else 1e-6
    torch.testing.assert_close(function(batch, precision=precision), single, atol=atol, rtol=0)
    nested = function(batch.reshape(2, 3, *batch.shape[1:]), precision=precision)
    torch.testing.assert_close(nested.flatten(0, 1), single, atol=atol, rtol=0)


@pytest.mark.parametrize("precision", [None, *Precision])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_of_the_input_comes_back(dtype, precision):
    g = gauss((12, 5)).to(dtype)
    assert polar(g, precision=precision).dtype == dtype
    if precision in (Precision.FP32, Precision.BF16X3):
        assert polar_gram(g, precision=precision).dtype == dtype


def test_six_steps_reach_the_bf16_floor_and_five_do_not():
    """The claim in coefficients.py: spread of the singular values about 1, on a tall Gaussian."""
    g = gauss((512, 128))
    floor = spread(polar(g, steps=10, precision=Precision.BF16))
    assert spread(polar(g, steps=5)) > 5 * floor
    assert spread(polar(g, steps=6)) < floor
    assert spread(polar(g, steps=6, precision=Precision.BF16)) < 2 * floor


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    scale=st.floats(-28, 28),
    seed=st.integers(0, 10**6),
    function=st.sampled_from([polar, polar_gram]),
    precision=st.sampled_from(FP32_LIKE),
)
def test_norm_never_above_two_percent(rows, cols, scale, seed, function, precision):
    out = function(gauss((rows, cols), seed) * 10.0**scale, precision=precision)
    assert torch.isfinite(out).all()
    assert norm2(out) < 1.02


@pytest.mark.parametrize("precision", [None, *Precision])
@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("shape", [(24, 24), (40, 8), (8, 40)])
def test_flops_are_those_torch_counts(shape, name, precision):
    solver = Polar(name, steps=3, precision=precision)
    with FlopCounterMode(display=False) as counter:
        solver(gauss(shape))
    assert solver.flops(shape) == counter.get_total_flops() > 0


def test_flops_follow_the_accuracy():
    solver = Polar(accuracy=1e-2, lower=1e-2)
    with FlopCounterMode(display=False) as counter:
        solver(gauss((16, 8)))
    assert solver.flops((16, 8)) == counter.get_total_flops()


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match="optim.polar.steps"):
        polar(gauss((4, 4)), steps=0)
    with pytest.raises(ValueError, match="optim.polar.coefficients"):
        Polar(coefficients="newton")
    for accuracy in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="optim.polar.accuracy"):
            Polar(accuracy=accuracy)
    for lower in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="optim.polar.lower"):
            Polar(lower=lower)
    with pytest.raises(ValueError, match=r"optim\.polar\.lower"):
        minimax(0.0, 3)
    with pytest.raises(ValueError, match=r"optim\.polar\.steps"):
        minimax(0.1, 0)
    with pytest.raises(ValueError, match="lower <= upper"):
        bounds(CUBIC.steps(1), 1.0, 0.5)


def test_a_table_that_cannot_converge_is_refused_with_what_it_reaches():
    with pytest.raises(ValueError, match=r"'keller' \(optim\.polar\.accuracy\).*within 0\.32"):
        Polar("keller", accuracy=0.1)
    assert Polar("keller", accuracy=0.35).plan()[0] > 1
    with pytest.raises(ValueError, match="optim.polar.accuracy"):
        steps_for(0.0, 1e-3)
