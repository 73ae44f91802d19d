"""Certificates against SVD, against closed forms, and against searches that try to break them."""

import dataclasses
import math

import pytest
import torch

from geon.optim.modular import (
    Embed,
    Linear,
    Network,
    Reading,
    Series,
    largest_row,
    spectral_bound,
)
from geon.optim.modular.bonds import Attention
from geon.optim.modular.certificate import certificate, measure, observe
from geon.optim.modular.search import Search
from geon.optim.polar import polar_svd
from tests.optim.test_modular import CASES, drawn, gaussian, tokens

SHAPES = [(1, 1), (7, 7), (64, 16), (16, 64), (40, 39), (9000, 5)]


def spectra(shape):
    """Matrices of hard spectra: flat, one large, two equal large ones, low rank, tiny, huge."""
    g = gaussian(shape, 0)
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    for scale in (1.0, 1e-12, 1e12):
        yield g * scale
        yield u @ v * scale
        yield u * torch.tensor([2.0 if i < 2 else 1.0 for i in range(len(s))]) @ v * scale
        yield u[:, :1] @ v[:1] * scale
        yield (u @ v * scale).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spectral_bound_is_never_below_the_largest_singular_value_and_near_it(shape):
    for weight in spectra(shape):
        true = float(torch.linalg.svdvals(weight.double())[0])
        assert true <= spectral_bound(weight) <= 1.004 * true
        rows = float(weight.double().norm(dim=1).max())
        assert rows <= largest_row(weight) <= rows * (1 + 1e-9)
    assert spectral_bound(torch.zeros(shape)) == 0.0


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_it_is_exact_on_stiefel(shape):
    weight = polar_svd(gaussian(shape, 1)) * 3.0
    assert spectral_bound(weight) == pytest.approx(3.0, rel=1e-7)
    assert spectral_bound(weight.float()) == pytest.approx(3.0, rel=1e-5)


def test_aligned_deep_linear_networks_are_tight():
    """Singular vectors of each matrix meet those of the next: the product's norm is the bound."""
    shapes = [(12, 8), (12, 12), (6, 12)]
    right, params, layers, exact = None, {"table": gaussian((5, 8), 0)}, [], 1.0
    for i, shape in enumerate(shapes):
        u, s, v = torch.linalg.svd(gaussian(shape, 1 + i), full_matrices=False)
        v = v if right is None else torch.cat((right[:, :1].T, v[1:]))
        params[f"w{i}"] = s[0] * u[:, :1] @ v[:1] + 0.1 * u[:, 1:2] @ torch.zeros_like(v[1:2])
        exact *= float(s[0])
        right = u
        layers.append(Linear(f"w{i}", shape))
    network = Network(Embed("table", (5, 8)), Series(tuple(layers)))
    found = certificate(network, measure(network, params.__getitem__))
    exact *= math.sqrt(8 / 6)
    product = params["w2"] @ params["w1"] @ params["w0"]
    assert float(torch.linalg.svdvals(product)[0]) * math.sqrt(8 / 6) == pytest.approx(exact)
    assert exact <= found.lipschitz <= exact * 1.005
    assert not found.conditional and found.condition == "The bounds hold for every input."
    # And a search finds it: along the first singular vector the network is as steep as that.
    v = torch.linalg.svd(params["w0"])[2][0].expand(1, 3, 8)
    assert float((v @ product.T).square().mean(-1).sqrt().max()) / float(
        v.square().mean(-1).sqrt().max()
    ) == pytest.approx(found.lipschitz, rel=5e-3)


def searched(arch, options, pairs, starts, steps, seed=0):
    model, params = drawn(arch, options, seed)
    network = model.modular()
    sizes = measure(network, params.__getitem__)
    search = Search(network, params, sizes, 6, torch.Generator().manual_seed(seed))
    return search.pairs(pairs), search.ascend(starts, steps)


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_no_search_breaks_a_certificate(arch, options):
    pairs, ascent = searched(arch, options, 300, 4, 3)
    assert not pairs.violated and not ascent.violated
    assert pairs.tried == 300 and ascent.tried == 4
    assert pairs.node > 0.99 and pairs.size > 0.99  # it comes to the bounds of nodes
    assert 0.0 < ascent.sensitivity <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "options"), CASES)
def test_ten_thousand_pairs_and_a_hundred_ascents_do_not(arch, options):
    pairs, ascent = searched(arch, options, 10_000, 100, 20, seed=1)
    assert not pairs.violated and not ascent.violated


def test_a_search_finds_a_bound_that_is_too_low(monkeypatch):
    model, params = drawn("gpt", {})
    network = model.modular()
    sizes = measure(network, params.__getitem__)
    for atom in sizes:
        if atom.param.endswith("down.weight"):
            low = dataclasses.replace(sizes[atom], gain=0.3 * sizes[atom].gain)
            lowered = {**sizes, atom: low}
    generator = torch.Generator().manual_seed(0)
    assert Search(network, params, lowered, 6, generator).pairs(64).violated
    monkeypatch.setattr(Attention, "bound", lambda self, xs: (xs[2], (0.01, 0.01, 0.01)))
    generator = torch.Generator().manual_seed(0)
    assert Search(network, params, sizes, 6, generator).pairs(64).violated


def test_outputs_that_are_no_numbers_hold_no_bound():
    model, params = drawn("gpt", {})
    network = model.modular()
    sizes = measure(network, params.__getitem__)
    name = next(name for name in params if name.endswith("down.weight"))
    broken = {**params, name: torch.full_like(params[name], math.nan)}
    generator = torch.Generator().manual_seed(0)
    found = Search(network, broken, sizes, 6, generator)
    assert found.pairs(8).violated and found.ascend(2, 0).violated


def test_what_is_said_of_conditions():
    model, params = drawn("gpt", {})
    network, t = model.modular(), tokens()
    sizes, seen = measure(network, params.__getitem__), observe(network, params.__getitem__, t)
    found = certificate(network, sizes, seen, t.numel())
    assert found.conditional and "smallest observed over 24 tokens" in found.table()
    rows = {row.name: row for row in found.rows}
    first = float(params["embed.weight"][t].square().mean(-1).sqrt().min())
    assert rows["norm_embed"].smallest == pytest.approx(first, rel=1e-5)
    assert rows["norm_embed"].lipschitz == pytest.approx(1 / first, rel=1e-5)
    blind = certificate(network, sizes)
    assert blind.lipschitz > found.lipschitz
    assert "nothing was observed" in blind.condition
    kept = found.to_dict()
    assert kept["tokens_observed"] == 24 and len(kept["nodes"]) == len(found.rows)


def test_a_certificate_does_not_change_under_a_rotation_of_the_stream():
    """Without norms and gains: sizes of matrices do not see a rotation of what they read."""
    model, params = drawn("gpt", {"norm": "none", "residual": "scaled"})
    network = model.modular()
    turn = torch.linalg.qr(gaussian((8, 8), 5))[0]
    turned = dict(params)
    for name, value in params.items():
        if name.endswith(("embed.weight", "head.weight", "up.weight", "q.weight", "k.weight",
                          "v.weight")):  # fmt: skip
            turned[name] = value @ turn
        if name.endswith(("proj_out.weight", "down.weight")):
            turned[name] = turn.T @ value
    for reading in (params, turned):
        sizes = measure(network, reading.__getitem__)
        spread = {a.key: sizes[a].gain for a in network.places() if isinstance(a, Linear)}
        if reading is params:
            first = spread
    assert spread == pytest.approx(first, rel=1e-6)


def test_bounds_may_be_tensors_one_for_each_input():
    model, params = drawn("gpt", {})
    network = model.modular()
    sizes = measure(network, params.__getitem__)
    smallest = observe(network, params.__getitem__, tokens())
    both = {place: torch.tensor([size, 2 * size]).double() for place, size in smallest.items()}
    found = network.trace(Reading(sizes, both))[1].lipschitz
    for i, factor in enumerate((1.0, 2.0)):
        alone = {place: factor * size for place, size in smallest.items()}
        one = network.trace(Reading(sizes, alone))[1].lipschitz
        assert float(found[i]) == pytest.approx(float(one), rel=1e-9)
