"""Steps from sums, beside the same steps on whole matrices and fp64."""

import pytest
import torch

from geon.optim import Ladder, Polar, Rule, Spectral, Stiefel, polar_svd
from geon.optim.finishes import CautiousDecay, RowCap
from geon.optim.manifolds import Oblique
from geon.optim.norms import ColNorm, RowNorm
from geon.optim.polar import KELLER, POLAR_EXPRESS, polar
from geon.optim.polar.gram import _inverse_root, _stable_ridge, polar_root
from geon.optim.polar.iterate import POLAR_MARGIN
from geon.optim.solvers.sums import RowForm, pack, unpack

SHAPES = [(64, 12), (12, 64), (48, 48), (30, 20)]
LR = 0.03


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cut(x, ranks, wide):
    """Slabs along the long side, as a batch of one."""
    return [None if x is None else s[None] for s in (x.mT if wide else x).chunk(ranks, dim=-2)]


def by_sums(rule, update, weight, ranks, lr=LR):
    """Sums of each slab, added up, coefficients, and the slabs put together."""
    shape = tuple(update.shape)
    form, wide = rule.gram_form(shape), shape[0] < shape[1]
    updates = cut(update, ranks, wide)
    weights = cut(weight, ranks, wide) if weight is not None else [None] * len(updates)
    pairs = list(zip(updates, weights, strict=True))
    sums = torch.stack([form.partial(u, w, shape) for u, w in pairs])
    assert sums.shape[-1] == form.down(min(shape))
    words, fell_back = form.combine(sums, shape, lr)
    assert words.shape[-1] == form.up(min(shape))
    assert fell_back is None or not fell_back.any()
    found = torch.cat([form.apply(words, u, w, shape)[0] for u, w in pairs])
    return found.mT if wide else found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("polar_factor", [Polar("keller", 5), Polar(), Polar(steps=10)])
def test_muon_from_grams_is_muon(shape, ranks, scale, polar_factor):
    rule = Rule(Spectral("muon", polar_factor))
    update = scale * gauss(shape)
    whole = rule.solve(update, None, shape).direction
    found = by_sums(rule, update, None, ranks)
    assert (found - whole).norm() <= 1e-3 * whole.norm()
    descent = lambda d: (update.double() / scale * d.double()).sum()  # noqa: E731
    assert abs(descent(found) - descent(whole)) <= 1e-5 * descent(whole)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] != s[1]])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("lr", [0.0, 0.01, 0.2])
def test_manifold_muon_from_grams_is_manifold_muon(shape, ranks, scale, lr):
    rule = Rule(Spectral(), Stiefel(2.0))
    weight, update = rule.manifold.project(gauss(shape, 1)), scale * gauss(shape, 2)
    whole = rule.move(weight, rule.solve(update, weight).direction, lr)
    found = by_sums(rule, update, weight, ranks, lr)
    # Nearly square matrices have directions that rounding moves by 1e-4, at equal descent.
    assert (found - whole).norm() <= (1e-6 + 3e-4 * lr) * whole.norm()
    assert rule.manifold.residual(found) <= (2e-4 if lr > 0.1 else 1e-5)


def test_a_drifted_weight_comes_back_to_the_manifold():
    """The retraction sees the weight's own Gram, not the identity that it should be."""
    rule = Rule(Spectral(), Stiefel())
    weight = rule.manifold.project(gauss((64, 12), 1)) + 1e-3 * gauss((64, 12), 3)
    before = rule.manifold.residual(weight)
    found = by_sums(rule, gauss((64, 12), 2), weight, 4, 0.01)
    assert rule.manifold.residual(found) < 0.01 * before


@pytest.mark.parametrize("rule", [Rule(Spectral()), Rule(Spectral(), Stiefel())])
def test_zero_gradients_move_nothing(rule):
    shape = (64, 12)
    weight = rule.manifold.project(gauss(shape, 1)) if rule.manifold.constrains else None
    found = by_sums(rule, torch.zeros(shape), weight, 3)
    assert torch.equal(found, torch.zeros(shape) if weight is None else weight)


def test_which_rules_have_the_form():
    assert Rule(Spectral(), Stiefel()).gram_form((8, 8)) is None
    assert Rule(Spectral(), Stiefel(), ladder=Ladder("oneshot")).gram_form((8, 4)) is None
    assert Rule(Spectral(), Stiefel(), ladder=Ladder(form="rect")).gram_form((8, 4)) is None
    assert Rule(ColNorm()).gram_form((8, 4)) is None
    assert Rule(Spectral()).row_form is None
    assert Rule(ColNorm(), Oblique()).row_form is None


def test_finishes_take_the_form_away_but_those_of_entries():
    """A sum has neither rows nor the whole of a direction; what is entry-wise needs neither."""
    even, capped = Rule(Spectral(), even_rows=True), Rule(ColNorm(), finishes=(RowCap(),))
    assert even.gram_form((8, 4)) is None
    assert capped.row_form is None
    for norm in (Spectral(), ColNorm()):
        rule = Rule(norm, decay=0.1, finishes=(CautiousDecay(),))
        assert rule.gram_form((8, 4)) == Rule(norm).gram_form((8, 4))
        assert rule.row_form == Rule(norm).row_form


@pytest.mark.parametrize("table", [KELLER, POLAR_EXPRESS], ids=["keller", "express"])
@pytest.mark.parametrize("kind", ["gauss", "decay", "low rank", "spike", "zero"])
def test_the_root_of_any_gram_stays_finite_and_near_the_polar_factor(table, kind):
    x = gauss((96, 48))
    if kind == "decay":
        x = x @ torch.diag(torch.logspace(0, -6, 48))
    elif kind == "low rank":
        x = gauss((96, 6)) @ gauss((6, 48), 1)
    elif kind == "spike":
        x = x + 1e3 * gauss((96, 1)) @ gauss((1, 48), 1)
    elif kind == "zero":
        x = torch.zeros(96, 48)
    steps = 5 if table is KELLER else 6
    found = x @ polar_root(x.mT @ x, steps, table)
    assert found.isfinite().all()
    if kind == "zero":
        assert not found.any()
        return
    assert torch.linalg.matrix_norm(found, 2) <= 1.25
    exact = polar(x.double(), steps, table)
    descent = lambda d: (x.double() * d.double()).sum()  # noqa: E731
    assert abs(descent(found) - descent(exact)) <= (3e-4 if kind == "spike" else 5e-5) * descent(
        exact
    )


def test_what_the_ridge_that_is_always_safe_would_cost():
    """2e-4 of the descent when columns decay over three decades; the least ridge costs 2e-6."""
    x = gauss((192, 192)) @ torch.diag(torch.logspace(0, -3, 192))
    exact = polar(x.double(), 5, KELLER)
    gram, norm = x.mT @ x, x.norm() * POLAR_MARGIN
    stable = _stable_ridge(x.dtype, None)
    safe = _inverse_root(gram / norm**2 + stable * torch.eye(192), KELLER.steps(5), None) / norm
    loss = [
        abs((x.double() * ((x @ root).double() - exact)).sum() / (x.double() * exact).sum())
        for root in (safe, polar_root(gram, 5, KELLER))
    ]
    assert 1e-4 < loss[0] < 4e-4
    assert loss[1] < 4e-6


def test_enough_steps_reach_the_exact_polar_factor():
    x = gauss((96, 24))
    found = x @ polar_root(x.mT @ x, 9, POLAR_EXPRESS)
    torch.testing.assert_close(found, polar_svd(x.double()).float(), atol=1e-4, rtol=0)


def test_packing_keeps_every_entry_of_a_symmetric_matrix():
    x = gauss((3, 7, 7))
    x = x + x.mT
    assert pack(x).shape == (3, 28)
    assert torch.equal(unpack(pack(x), 7), x)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("norm", [ColNorm(), RowNorm()])
def test_rows_that_ranks_share_are_scaled_by_their_whole_length(scale, norm):
    rows = scale * gauss((6, 10))
    rows[3] = 0.0
    pieces = rows.split([4, 5, 1], dim=-1)
    form = Rule(norm).row_form
    assert form == RowForm(norm)
    lengths = form.combine(torch.stack([form.partial(piece) for piece in pieces]))
    found = torch.cat([form.apply(piece, lengths, (6, 10)) for piece in pieces], dim=-1)
    torch.testing.assert_close(found, norm.lmo(rows), rtol=1e-5, atol=0)
    assert not found[3].any()
    assert torch.equal(form.apply(rows, None, (6, 10)), norm.lmo(rows))
