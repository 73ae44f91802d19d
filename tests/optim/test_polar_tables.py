import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.optim.polar import (
    CUBIC,
    KELLER,
    POLAR_EXPRESS,
    Coefficients,
    Polar,
    bounds,
    minimax,
    polar,
    steps_for,
)


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(shape, values, seed=0):
    """Matrix in fp64 with these singular values and random singular vectors."""
    u, _ = torch.linalg.qr(gauss((shape[0], len(values)), seed).double())
    v, _ = torch.linalg.qr(gauss((shape[1], len(values)), seed + 1).double())
    return (u * torch.as_tensor(values, dtype=torch.float64)) @ v.mT


def spread(x):
    return (torch.linalg.svdvals(x.double()) - 1).abs().max().item()


def compose(triples, x):
    for a, b, c in triples:
        x = a * x + b * x**3 + c * x**5
    return x


def test_the_generator_gives_the_published_table():
    """Amsel et al., from l = 1e-3 and cushion 0.02407; they print the limit as the last triple."""
    ours = minimax(1e-3, 8)
    np.testing.assert_allclose(ours.triples[:6], POLAR_EXPRESS.triples[:6], rtol=1e-13)
    np.testing.assert_allclose(ours.triples, POLAR_EXPRESS.triples, rtol=1e-8)
    assert ours.safety == POLAR_EXPRESS.safety
    assert ours is minimax(1e-3, 8)


def test_without_cushion_the_generator_gives_the_table_of_cans():
    """Grishina et al., arXiv 2506.10935, found the same optimum on their own."""
    published = [
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ]
    np.testing.assert_allclose(minimax(1e-3, 5, cushion=0.0).triples, published, atol=6e-5)


@settings(max_examples=60, deadline=None)
@given(
    low=st.floats(-6, -0.01).map(lambda exponent: 10**exponent),
    shift=st.tuples(*[st.floats(-0.3, 0.3)] * 3),
)
def test_no_odd_quintic_is_closer_to_one(low, shift):
    """Chebyshev: four alternating errors of one size prove it, and no other quintic beats it."""
    triple = minimax(low, 1, cushion=0.0).triples[0]
    x = np.union1d(np.linspace(low, 1, 4001), np.geomspace(low, 1, 4001))
    error = 1 - compose([triple], x)
    worst = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > worst * (1 - 1e-5) - 1e-12])
    assert np.count_nonzero(np.diff(signs)) >= 3
    moved = tuple(v + w for v, w in zip(triple, shift, strict=True))
    assert np.abs(1 - compose([moved], x)).max() >= worst - 2e-6


def test_first_triples_do_not_depend_on_the_number_of_steps():
    assert minimax(1e-4, 3).triples == minimax(1e-4, 9).triples[:3]


@pytest.mark.parametrize(
    ("table", "low", "high", "start"),
    [
        (POLAR_EXPRESS, 0.98, 1.02, 1e-2),
        (POLAR_EXPRESS, 0.99, 1.01, 1e-3),
        (KELLER, 0.65, 1.25, 1e-2),
        (CUBIC, 0.11, 1.0 + 1e-12, 1e-2),
        (minimax(1e-2, 6), 1 - 1e-5, 1 + 1e-5, 1e-2),
    ],
)
def test_interval_of_each_table(table: Coefficients, low, high, start):
    """Re-derive where singular values in [start, 1] end, from the scalar polynomial alone."""
    for steps in (1, 2, 5, 6):
        x = np.linspace(start / 1.01, 1.0 / 1.01, 200_001)
        x = compose(table.steps(steps), x)
        found = bounds(table.steps(steps), start / 1.01, 1 / 1.01)
        assert found[0] <= x.min() + 1e-12 and x.max() - 1e-12 <= found[1]
        np.testing.assert_allclose(found, (x.min(), x.max()), rtol=1e-4)
    assert low < x.min() and x.max() < high


def test_the_interval_in_the_source_of_keller():
    low, high = bounds(KELLER.steps(50), 1e-3)
    assert (round(low, 2), round(high, 2)) == (0.68, 1.13)


def test_the_accuracies_in_the_source_of_polar_express():
    assert steps_for(6e-3, 1e-3, POLAR_EXPRESS) == 6
    assert steps_for(1e-6, 1e-3, POLAR_EXPRESS) == 7


@settings(max_examples=60, deadline=None)
@given(
    triples=st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=3
    ),
    ends=st.tuples(st.floats(-1.2, 1.2), st.floats(-1.2, 1.2)),
    share=st.floats(0, 1),
)
def test_bounds_hold_for_any_polynomial(triples, ends, share):
    lower, upper = sorted(ends)
    low, high = bounds(triples, lower, upper)
    x = compose(triples, np.linspace(lower, upper, 257))
    slack = 1e-9 * (1 + max(abs(low), abs(high)))
    assert low - slack <= x.min() and x.max() <= high + slack
    y = compose(triples, lower + share * (upper - lower))
    assert low - slack <= y <= high + slack


@pytest.mark.parametrize("name", ["polar_express", "cubic"])
@pytest.mark.parametrize("lower", [0.05, 1e-2, 1e-3])
@pytest.mark.parametrize("accuracy", [1e-1, 1e-2, 1e-6])
def test_accuracy_is_kept_and_one_step_fewer_does_not_keep_it(name, lower, accuracy):
    """By SVD, on singular values from lower up, in shares of the Frobenius norm."""
    rest = torch.linspace(lower, 0.1, 31, dtype=torch.float64)
    top = (1 - rest.square().sum()).sqrt()
    g = 7.0 * with_spectrum((48, 32), torch.cat([top.view(1), rest]))
    solver = Polar(name, accuracy=accuracy, lower=lower)
    steps, table = solver.plan()
    assert spread(solver(g)) <= accuracy
    fewer = minimax(lower / 1.01, steps - 1) if name == "polar_express" else table
    assert spread(polar(g, steps - 1, fewer)) > accuracy


def test_easy_spectra_take_half_the_steps_of_the_published_table():
    assert steps_for(0.1, 0.1) == 2
    assert steps_for(0.1, 0.1, POLAR_EXPRESS) == 6


def test_without_accuracy_the_steps_and_the_published_table_stand():
    assert Polar(steps=3, lower=1e-5).plan() == (3, POLAR_EXPRESS)
