"""What a finish does not go with is refused by the name of its setting."""

import math

import pytest

from geon.errors import UsageError
from geon.optim import Rule, Spectral
from geon.optim.finishes import (
    CautiousDecay,
    EvenRows,
    RadialBrake,
    RowCap,
    RowMoments,
    UpdateFloor,
)
from geon.optim.manifolds import DGram, Euclidean, SpectralBall, Stiefel
from geon.optim.norms import ColNorm, Frobenius, Sign
from tests.optim.test_finishes import CASES, DECAY


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: RowMoments(x), r"second_moment .* is the fraction kept"),
        (lambda x: RadialBrake(outward=x), r"radial_brake outward .* is a share"),
        (lambda x: RadialBrake(inward=x), r"radial_brake inward .* is a share"),
    ],
)
@pytest.mark.parametrize("number", [-0.1, 1.1, math.nan, math.inf])
def test_shares_out_of_range_are_refused(make, told, number):
    with pytest.raises(ValueError, match=told):
        make(number)


def test_a_second_moment_that_never_changes_is_refused():
    with pytest.raises(ValueError, match=r"second_moment 1\.0 is the fraction kept"):
        RowMoments(1.0)


@pytest.mark.parametrize(
    ("make", "told"),
    [(RowCap, "row_cap most .* above 0"), (UpdateFloor, "update_floor least .* above 0")],
)
@pytest.mark.parametrize("number", [0.0, -1.0, math.nan])
def test_sizes_that_are_not_positive_are_refused(make, told, number):
    with pytest.raises(ValueError, match=told):
        make(number)


def test_a_floor_of_infinity_is_refused():
    """It would make weights of infinity; a cap of infinity is no cap."""
    with pytest.raises(ValueError, match="update_floor least"):
        UpdateFloor(math.inf)


@pytest.mark.parametrize("norm", [Sign(), Frobenius(), ColNorm()])
@pytest.mark.parametrize(
    ("finish", "told"),
    [(EvenRows(), "even_rows gives the rows"), (RowMoments(0.9), r"second_moment 0\.9 divides")],
)
def test_finishes_of_polar_factors_are_refused_under_other_norms(finish, told, norm):
    with pytest.raises(UsageError, match=rf"{told}.*norm=spectral.*{type(norm).__name__} x Eucl"):
        Rule(norm, finishes=(finish,))


@pytest.mark.parametrize("manifold", [Stiefel(), DGram()])
@pytest.mark.parametrize(
    ("finish", "told"),
    [
        (EvenRows(), "even_rows"),
        (RowMoments(0.9), r"second_moment 0\.9"),
        (RowCap(), "row_cap"),
        (RadialBrake(), "radial_brake"),
    ],
)
def test_finishes_that_leave_the_tangent_space_are_refused_on_manifolds(finish, told, manifold):
    """By the name of the setting, and what it goes with."""
    with pytest.raises(UsageError, match=rf"{told}.*manifold=euclidean or spectral_ball"):
        Rule(Spectral(), manifold, finishes=(finish,))


def test_cautious_decay_is_refused_where_there_is_none():
    with pytest.raises(UsageError, match="cautious_decay .* weight_decay is 0"):
        Rule(Spectral(), finishes=(CautiousDecay(),))
    with pytest.raises(UsageError, match=r"weight decay 0\.1 on Stiefel"):
        Rule(Spectral(), Stiefel(), decay=0.1, finishes=(CautiousDecay(),))
    with pytest.raises(UsageError, match="manifold=euclidean or spectral_ball"):
        Rule(Spectral(), DGram(), decay=0.1, finishes=(CautiousDecay(),))


@pytest.mark.parametrize(
    "finishes",
    [
        (EvenRows(), RowMoments()),
        (RowMoments(), EvenRows()),
        (RowMoments(0.9), RowMoments(0.8)),
        (RowCap(2.0), UpdateFloor(), RowCap(3.0)),
    ],
)
def test_a_finish_acts_once_and_one_alone_sets_the_lengths_of_rows(finishes):
    with pytest.raises(UsageError, match="a finish acts once: keep one of"):
        Rule(Spectral(), finishes=finishes)
    with pytest.raises(UsageError, match="even_rows and second_moment both"):
        Rule(Spectral(), even_rows=True, second_moment=0.9)


@pytest.mark.parametrize("manifold", [Euclidean(), SpectralBall()])
@pytest.mark.parametrize("name", list(CASES))
def test_flat_manifolds_take_every_finish(name, manifold):
    """And Stiefel what only lengthens."""
    rule = Rule(Spectral(), manifold, decay=DECAY, finishes=(CASES[name],))
    assert rule.finishes == (CASES[name],)
    assert Rule(Spectral(), Stiefel(), finishes=(UpdateFloor(),)).finishes == (UpdateFloor(),)


@pytest.mark.parametrize("radius", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_radius_must_be_a_length(radius):
    """A negative one would ascend."""
    with pytest.raises(UsageError, match="radius .* must be finite and above 0"):
        Rule(Spectral(), radius=radius)
