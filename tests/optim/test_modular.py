"""The modular norm against cases worked out by hand, and against derivatives in fp64."""

import math

import pytest
import torch

from geon.errors import UsageError
from geon.models import MODELS, ModelShape
from geon.optim import MANIFOLDS
from geon.optim.modular import (
    Add,
    Attention,
    Bias,
    Embed,
    Gelu,
    Join,
    Linear,
    ModularNorm,
    Network,
    ProductManifold,
    Reading,
    Scale,
    Series,
    Size,
    Softcap,
    SquaredRelu,
    Values,
    exact_norms,
    residual,
    rms,
    split,
)
from geon.optim.modular.certificate import measure, observe

SMALL = {"vocab_size": 23, "context": 8, "n_layer": 2, "n_head": 2, "d_model": 8}
CASES = [
    ("gpt", {}),
    ("gpt", {"tied": True, "gains": True}),
    ("gpt", {"norm": "none", "residual": "scaled"}),
    ("gpt", {"fused_qkv": True, "softcap": 5.0, "activation_scale": 2.0, "residual": "scaled"}),
    ("gpt2", {"fused_qkv": True}),
    ("gpt_track3", {"softcap": 15.0}),
]


def drawn(arch, options, seed=0):
    """A model in fp64 whose weights are all nonzero, and its parameters."""
    model = MODELS[arch](ModelShape(**{**SMALL, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for info in model.infos:
            noise = 0.1 * torch.randn(info.shape, generator=generator)
            model.get_parameter(info.name).copy_(model.initial(info, generator) + noise)
    model.double()
    return model, {name: param.detach() for name, param in model.named_parameters()}


def tokens(seed=0):
    return torch.randint(0, 23, (3, 8), generator=torch.Generator().manual_seed(seed))


def gaussian(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def spectral(w):
    """RMS -> RMS norm by SVD."""
    return math.sqrt(w.shape[1] / w.shape[0]) * float(torch.linalg.svdvals(w)[0])


def nuclear(g):
    """Its dual norm: <g, dw> is largest at sqrt(d_out/d_in) times the polar factor."""
    return math.sqrt(g.shape[0] / g.shape[1]) * float(torch.linalg.svdvals(g).sum())


def two_modules():
    """Embedding of mass 1, then a matrix of mass 3 and a bond of sensitivity 2."""
    table = Embed("table", (5, 4), own_mass=1.0)
    return Network(table, Series((Linear("w", (6, 4), own_mass=3.0), Scale(2.0))))


def test_two_modules_by_hand():
    network = two_modules()
    g = {"table": gaussian((5, 4), 0), "w": gaussian((6, 4), 1)}
    norm = ModularNorm.of(network, norms=exact_norms(network))
    # The bond doubles what both change; masses are 1/4 and 3/4.
    rows = g["table"].norm(dim=1)
    by_hand = max(4 * 2 * float(rows.max()) / math.sqrt(4), 4 / 3 * 2 * spectral(g["w"]))
    assert norm.norm(g) == pytest.approx(by_hand, rel=1e-12)
    dual = math.sqrt(4) * float(rows.sum()) / 8 + nuclear(g["w"]) / (8 / 3)
    assert norm.dual(g) == pytest.approx(dual, rel=1e-12)
    step = norm.steepest(g)
    assert norm.norm(step) == pytest.approx(1.0, rel=1e-12)
    assert float(sum((g[key] * step[key]).sum() for key in g)) == pytest.approx(dual, rel=1e-9)


def test_three_modules_by_hand():
    """(1/2) x + (1/2) W2 W1 x, then W3: masses 1, 2, 3 of 7 with the table's."""
    branch = Series((Linear("w1", (4, 4)), Linear("w2", (4, 4), own_mass=2.0)))
    body = Series((residual(branch, 0.5), Linear("w3", (3, 4), own_mass=3.0)))
    network = Network(Embed("table", (5, 4)), body)
    weights = {key: gaussian(shape, i) for i, (key, shape) in enumerate(
        {"table": (5, 4), "w1": (4, 4), "w2": (4, 4), "w3": (3, 4)}.items()
    )}  # fmt: skip
    a, b, c = (spectral(weights[key]) for key in ("w1", "w2", "w3"))
    size = float(rms(weights["table"]).max())
    sizes = measure(network, weights.__getitem__)
    found = ModularNorm.of(network, Reading(sizes)).coefficients
    assert found["w1"] == pytest.approx(7 / 1 * size * b * 0.5 * c, rel=2e-3)
    assert found["w2"] == pytest.approx(7 / 2 * size * a * 0.5 * c, rel=2e-3)
    assert found["w3"] == pytest.approx(7 / 3 * size * (0.5 + 0.5 * a * b), rel=2e-3)
    assert found["table"] == pytest.approx(7 / 1 * (0.5 + 0.5 * a * b) * c, rel=2e-3)
    unit = ModularNorm.of(network).coefficients
    assert unit == pytest.approx({"table": 7.0, "w1": 3.5, "w2": 1.75, "w3": 7 / 3}, rel=1e-12)


def test_a_mass_given_to_a_composition_is_shared_in_proportion():
    inner = Series((Linear("a", (2, 2), own_mass=1.0), Linear("b", (2, 2), own_mass=3.0)), total=8)
    network = Network(Embed("t", (3, 2), own_mass=2.0), inner)
    assert network.shares() == pytest.approx({"t": 0.2, "a": 0.2, "b": 0.6})


def test_a_sum_of_two_and_a_weight_that_is_read_twice():
    """f(x) = W x + W W x: both places count."""
    w = Linear("w", (4, 4))
    network = Network(Embed("t", (3, 4)), Join((w, Series((w, w))), Add()))
    params = {"t": torch.ones(3, 4).double(), "w": 2.0 * torch.eye(4).double()}
    changes = network.changes(Reading(measure(network, params.__getitem__)))
    assert changes["w"] == pytest.approx(1.0 + (2.0 + 2.0))
    assert changes["t"] == pytest.approx(2.0 + 4.0)
    assert list(network.atoms()) == ["t", "w"]


def test_what_a_weight_of_zeros_hides_is_refused():
    network = two_modules()
    params = {"table": torch.ones(5, 4), "w": torch.zeros(6, 4)}
    reading = Reading(measure(network, params.__getitem__))
    with pytest.raises(UsageError, match="'table' is 0"):
        ModularNorm.of(network, reading)


def test_the_product_of_manifolds_steps_each_weight_on_its_own():
    network = Network(
        Embed("table", (5, 4)), Series((Linear("w1", (4, 4)), Scale(3.0), Linear("w2", (6, 4))))
    )
    generator = torch.Generator().manual_seed(0)
    manifolds = {"w1": MANIFOLDS["stiefel"](radius=1.0)}
    product = ProductManifold(ModularNorm.of(network), manifolds)
    shapes = {"table": (5, 4), "w1": (4, 4), "w2": (6, 4)}
    weights = {key: gaussian(shape, i).float() for i, (key, shape) in enumerate(shapes.items())}
    weights["w1"] = manifolds["w1"].random_point((4, 4), generator)
    g = {key: gaussian(shape, 9 + i).float() for i, (key, shape) in enumerate(shapes.items())}
    step = product.steepest(g, weights)
    # Masses are alike, and 3 multiplies what the table and w1 change, and what w2 reads.
    w, k = weights["w1"].double(), g["w1"].double()
    b = w.T @ k
    u, _, v = torch.linalg.svd((b - b.T) / 2)
    assert step["w1"].double() == pytest.approx(w @ u @ v / 9, abs=1e-4)
    assert spectral(step["w2"].double()) == pytest.approx(1 / 9, rel=0.05)
    assert float(rms(step["table"]).max()) == pytest.approx(1 / 9, rel=1e-5)
    assert product.norm(step) == pytest.approx(1.0, rel=0.05)
    assert product.tangent(weights, step)["w1"] == pytest.approx(step["w1"], abs=1e-5)
    moved = {key: weights[key] - step[key] for key in weights}
    landed = product.retract(weights, moved)
    assert product.residual(landed) < 1e-5 < product.residual(moved)
    assert torch.equal(landed["w2"], moved["w2"])
    by_hand = sum(float((g[key] * step[key]).sum()) for key in g)
    assert product.dual(g, weights) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_a_description_computes_what_its_model_computes(arch, options):
    model, params = drawn(arch, options)
    network, t = model.modular(), tokens()
    found = network.forward(t, Values(lambda atom: atom.take(params[atom.param])))
    torch.testing.assert_close(found, model(t).detach().double(), rtol=1e-5, atol=1e-5)
    assert {atom.param for atom in network.places()} == set(params)


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_the_output_moves_by_the_modular_norm_of_dw_at_most(arch, options):
    """First order, by JVP in fp64: under random changes, and under the steepest ones."""
    model, params = drawn(arch, options)
    network, t = model.modular(), tokens()
    smallest = observe(network, params.__getitem__, t)
    sizes = measure(network, params.__getitem__)
    # Observed in fp32; the smallest RMS is needed to no more digits than that.
    reading = Reading(sizes, {place: 0.999999 * size for place, size in smallest.items()})
    norm = ModularNorm.of(network, reading, exact_norms(network))
    atoms = network.places()
    keys = list(network.atoms())
    own = split(network, params)

    def output(changed):
        by_atom = {atom: changed[atom.key] for atom in atoms}
        return network.forward(t, Values(by_atom.__getitem__, noting=False))

    def moved(dw):
        dw = {key: dw[key] for key in keys}
        return float(rms(torch.func.jvp(output, (own,), (dw,))[1]).max()) / norm.norm(dw)

    ratios = []
    for seed in range(2):
        dw = {key: gaussian(value.shape, seed) for key, value in own.items()}
        ratios.append(moved(norm.steepest(dw)))
        for key in keys if not seed else ():  # one weight alone: its own bound
            ratios.append(moved({k: v * (k == key) for k, v in dw.items()}))
        # Ascent: the gradient of the change's size is the direction that moves the output most.
        for _ in range(2):
            grad = torch.func.grad(
                lambda at: rms(torch.func.jvp(output, (own,), (at,))[1]).square().sum()
            )(dw)
            dw = norm.steepest(grad)
            ratios.append(moved(dw))
    assert max(ratios) <= 1.0
    assert min(ratios) > 0.0


def size(x):
    return rms(x).amax(-1)


ONE_ENTRY, EVEN = [4.0] + [0.0] * 15, [4.0] * 16


@pytest.mark.parametrize(
    ("bond", "x"),
    [
        (SquaredRelu(), ONE_ENTRY),
        (SquaredRelu(0.5), ONE_ENTRY),
        (Gelu("tanh"), ONE_ENTRY),
        (Gelu("none"), ONE_ENTRY),
        (Softcap(2.0), EVEN),
        (Softcap(2.0, True), EVEN),
    ],
)
def test_bonds_of_one_input_come_near_their_bounds_and_not_above(bond, x):
    """The slope on all entries of a fine grid; the size for the vector that makes the most."""
    grid = torch.linspace(-4, 4, 200_001, dtype=torch.float64)
    nothing = Values({}.get)
    slope = bond.forward(grid, nothing).diff() / grid.diff()
    x = torch.tensor(x, dtype=torch.float64)
    out, lipschitz = bond.bound(Size(float(rms(x)), 4.0))
    assert 0.99 * lipschitz < float(slope.abs().max()) <= lipschitz * (1 + 1e-9)
    assert 0.89 * out.rms < float(rms(bond.forward(x, nothing))) <= out.rms


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_reaches_its_bound_in_values_and_keeps_below_in_queries_and_keys(heads):
    """Values in one head each, and odds that give each head another token: sqrt(heads)."""
    width, time = 4, 6
    bond = Attention(heads, width, 1.0 / width)
    v = torch.zeros(1, time, heads, width, dtype=torch.float64)
    q, k = v.clone(), v.clone()
    for head in range(heads):
        v[0, head, head] = math.sqrt(heads)  # token `head` has all its size in head `head`
        k[0, head, head, 0] = q[0, :, head, 0] = 40.0
    q, k, v = (x.flatten(-2) for x in (q, k, v))
    out = bond.forward([q, k, v])
    bound, shares = bond.bound([Size(float(size(x)), float(x.abs().max())) for x in (q, k, v)])
    assert float(size(v)) == pytest.approx(1.0)
    assert float(size(out)) == pytest.approx(math.sqrt(heads), rel=1e-3)
    assert float(size(out)) <= bound.rms and shares[2] == pytest.approx(math.sqrt(heads))
    generator = torch.Generator().manual_seed(heads)
    worst = 0.0
    for _ in range(50):
        xs = [torch.randn(1, time, heads * width, generator=generator).double() for _ in range(3)]
        sizes = [Size(float(size(x)), float(x.abs().max())) for x in xs]
        _, shares = bond.bound(sizes)
        for i in range(3):
            dx = torch.randn(xs[i].shape, generator=generator).double()
            step = torch.func.jvp(
                lambda at, i=i, xs=xs: bond.forward([*xs[:i], at, *xs[i + 1 :]]), (xs[i],), (dx,)
            )[1]
            worst = max(worst, float(size(step) / (shares[i] * size(dx))))
    assert 0.05 < worst <= 1.0


def test_the_product_of_all_reaches_attention_s_bound_in_queries():
    """Two keys k and -k with values v and -v: the logits' difference moves 2, the output by v."""
    width = 4
    bond = Attention(1, width, 1.0 / width)
    k = torch.ones(1, 2, width, dtype=torch.float64) * torch.tensor([1.0, -1.0])[None, :, None]
    q = torch.zeros_like(k)
    dq = torch.ones_like(k)
    moved = torch.func.jvp(lambda at: bond.forward([at, k, k]), (q,), (dq,))[1]
    one = Size(1.0, 1.0)
    assert float(size(moved)) == pytest.approx(bond.bound([one, one, one])[1][0])


def test_biases_and_unit_reading():
    network = Network(Embed("t", (3, 4)), Series((Linear("w", (4, 4)), Bias("b", (4,)))))
    assert network.changes() == {"t": 1.0, "w": 1.0, "b": 1.0}
