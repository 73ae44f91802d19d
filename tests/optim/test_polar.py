import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.optim.polar import KELLER, POLAR_EXPRESS, Coefficients, Polar, polar, polar_svd

SHAPES = [(64, 64), (128, 32), (32, 128), (65, 33), (1, 7), (7, 1), (1, 1)]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("exponent", [-30, -12, -3, 0, 3, 12, 30])
def test_scale_does_not_matter(exponent):
    g = gauss((96, 24))
    torch.testing.assert_close(polar(g * 10.0**exponent), polar(g), atol=1e-4, rtol=0)


def test_zero_in_zero_out_beside_others():
    batch = torch.stack([gauss((8, 4)), torch.zeros(8, 4)])
    out = polar(batch)
    assert torch.equal(out[1], torch.zeros(8, 4))
    assert torch.isfinite(out).all()


def test_batched_equals_one_by_one():
    batch = torch.stack([gauss((48, 16), seed) for seed in range(5)])
    single = torch.stack([polar(g) for g in batch])
    torch.testing.assert_close(polar(batch), single, atol=1e-6, rtol=0)


def test_six_steps_reach_the_bf16_floor_and_five_do_not():
    """The claim in coefficients.py: spread of the singular values about 1, on a tall Gaussian."""
    g = gauss((512, 128))

    def spread(steps, dtype=None):
        s = torch.linalg.svdvals(polar(g, steps=steps, dtype=dtype))
        return (s - 1).abs().max().item()

    floor = spread(10, torch.bfloat16)
    assert spread(5) > 5 * floor
    assert spread(6) < floor
    assert spread(6, torch.bfloat16) < 2 * floor


@pytest.mark.parametrize(
    ("table", "low", "high", "start"),
    [(POLAR_EXPRESS, 0.98, 1.02, 1e-2), (KELLER, 0.65, 1.25, 1e-2)],
)
def test_interval_of_each_table(table: Coefficients, low, high, start):
    """Re-derive where singular values in [start, 1] end, from the scalar polynomial alone."""
    x = torch.linspace(start, 1.0, 20_001, dtype=torch.float64) / 1.01
    for a, b, c in table.steps(6):
        x = a * x + b * x**3 + c * x**5
    assert low < x.min() and x.max() < high


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    scale=st.floats(-28, 28),
    seed=st.integers(0, 10**6),
)
def test_norm_never_above_two_percent(rows, cols, scale, seed):
    out = polar(gauss((rows, cols), seed) * 10.0**scale)
    assert torch.isfinite(out).all()
    assert torch.linalg.matrix_norm(out, 2) < 1.02


def test_bad_settings_name_the_key():
    with pytest.raises(ValueError, match="optim.polar.steps"):
        polar(gauss((4, 4)), steps=0)
    with pytest.raises(ValueError, match="optim.polar.coefficients"):
        Polar(coefficients="newton")
