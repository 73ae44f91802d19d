"""Gradients and rates that are hard on every recipe: finite and on the manifold, or refused."""

import math

import pytest
import torch
from torch import nn

from geon.configs.recipes import recipes
from geon.errors import UsageError
from geon.optim import BASELINES, Rule, build
from geon.optim.health import Watch

NAMES = [name for name in recipes() if name != "sophia"]  # which needs a loss of its own
MANIFOLDS = ["manifold_muon", "hybrid", "muonh", "spectral_sphere", "hyperspherical"]


class Net(nn.Module):
    """Wide, square, tall, thin and empty matrices, heads, vectors, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 8)
        self.fc, self.sq = nn.Linear(8, 24), nn.Linear(24, 24)
        self.q_proj = nn.Linear(24, 16, bias=False)
        self.one, self.back = nn.Linear(16, 1, bias=False), nn.Linear(1, 16, bias=False)
        self.none, self.empty = nn.Linear(16, 0, bias=False), nn.Linear(0, 16)
        self.frozen = nn.Linear(16, 16, bias=False)
        self.frozen.weight.requires_grad_(False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        x = self.q_proj(torch.relu(self.sq(torch.relu(self.fc(self.emb(x))))))
        x = x + self.back(self.one(x)) + self.empty(self.none(x)) + self.frozen(x)
        return self.head(self.norm(x))


def make(recipe, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = Net().to(dtype)
    roles = dict.fromkeys(("one.weight", "back.weight", "none.weight", "empty.weight"), "hidden")
    return net, build(net, recipe, overrides=roles, verbose=False, project=True, **options)


def feed(net, scale=1.0, rank=0):
    for param in net.parameters():
        grad = torch.randn(param.shape)
        if rank and grad.ndim == 2 and grad.numel():
            grad = grad[:, :1] @ grad[:1]
        if scale > 1e37:
            grad = grad.sign() * 3.0
        if param.requires_grad:
            param.grad = (grad * scale).to(param.dtype)


def check(net, optimizer, within=1e-3):
    """Everything finite; weights on their manifolds."""
    for name, param in net.named_parameters():
        assert param.isfinite().all(), name
    for key, one in optimizer.state_tensors().items():
        assert one.isfinite().all(), key
    assert far(optimizer) <= within


def far(optimizer):
    """Largest residual of any matrix on a manifold."""
    found = [0.0]
    params = dict(optimizer.named_parameters())
    for matrix in {job.matrix for job in optimizer.plan.jobs}:
        rule = optimizer.rules[matrix.route]
        if isinstance(rule, Rule) and rule.manifold.constrains:
            whole = params[matrix.param].detach().float().view(matrix.layout.shape)
            blocks = matrix.view.open(whole[matrix.box.slices][None])
            found += [float(rule.manifold.residual(one / matrix.scale).max()) for one in blocks]
    return max(found)


CASES = {
    "zero": {"scale": 0.0},
    "rank one": {"rank": 1},
    "subnormal": {"scale": 1e-45},
    "tiny": {"scale": 1e-30},
    "large": {"scale": 1e15},
    "bf16": {},
}


@pytest.mark.row("R22")
@pytest.mark.row("R24")
@pytest.mark.parametrize("recipe", NAMES)
def test_finite_gradients_leave_finite_weights_on_their_manifolds(recipe):
    for case, how in CASES.items():
        half = case == "bf16"
        net, optimizer = make(recipe, torch.bfloat16 if half else torch.float32)
        frozen = net.frozen.weight.clone()
        for _ in range(3):
            feed(net, **how)
            optimizer.step()
        check(net, optimizer, 3e-2 if half else 1e-3)
        assert torch.equal(frozen, net.frozen.weight)
        assert net.none.weight.numel() == 0


@pytest.mark.row("R22")
@pytest.mark.parametrize("recipe", NAMES)
@pytest.mark.parametrize("scale", [1e25, 1e38, math.inf, math.nan])
def test_what_averages_cannot_hold_is_refused_by_name_and_changes_nothing(recipe, scale):
    net, optimizer = make(recipe)
    feed(net)
    optimizer.step()
    feed(net, scale if math.isfinite(scale) else 1.0)
    if not math.isfinite(scale):
        net.sq.weight.grad[3, 4] = scale
    before = {n: p.clone() for n, p in net.named_parameters()}
    squares = not all(isinstance(rule, Rule) for rule in optimizer.rules.values())
    if scale == 1e25 and not squares:
        optimizer.step()
        check(net, optimizer)
        return
    with pytest.raises(FloatingPointError, match=r"a gradient of '\w+\.\w+'"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in net.named_parameters())


@pytest.mark.row("R24")
def test_one_tensor_under_two_names_is_refused():
    net = Net()
    net.again = net.sq
    net.second = nn.Parameter(net.fc.weight)
    net.fc.register_parameter("other", net.fc.weight)
    with pytest.raises(UsageError, match="one tensor|tied|is declared|unsure"):
        infos_twice(net)


def infos_twice(net):
    from geon.optim import Group, HybridOptimizer, ParamInfo, Role, Spectral

    infos = [ParamInfo(name, (24, 24), Role.HIDDEN) for name in ("a", "b")]
    HybridOptimizer([Group("g", Rule(Spectral()), 0.1, [(i, net.sq.weight) for i in infos])])


def drift(recipe, rate, steps, dtype=torch.float32):
    net, optimizer = make(recipe, dtype, lr=rate)
    for _ in range(steps):
        feed(net)
        optimizer.step()
    check(net, optimizer, 1e-3 if dtype == torch.float32 else 3e-2)


@pytest.mark.row("R23")
@pytest.mark.parametrize("recipe", MANIFOLDS)
def test_weights_stay_on_their_manifold_at_any_rate(recipe):
    for rate in (1e-4, 0.19, 0.3, 1.0, 10.0, 250.0):
        drift(recipe, rate, 8)
    drift(recipe, 1e-4, 8, torch.bfloat16)
    drift(recipe, 10.0, 8, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.row("R23")
@pytest.mark.parametrize("recipe", MANIFOLDS)
def test_weights_stay_on_their_manifold_for_500_steps(recipe):
    for rate in (1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0):
        drift(recipe, rate, 500)
        drift(recipe, rate, 500, torch.bfloat16)


@pytest.mark.row("R23")
def test_angles_that_fp32_loses_are_refused():
    with pytest.raises(UsageError, match="is an angle on Stiefel, in radians: it must be at most"):
        make("manifold_muon", lr=1e4)


def moves(recipe, spike, size, steps=200, at=100):
    """Moves of two matrices in a run with a gradient `size` times too large in step `at`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
    optimizer = build(net, recipe, overrides={"*": "hidden"}, verbose=False)
    optimizer.watch = Watch(spike=spike)
    generator = torch.Generator().manual_seed(1)
    signal = [torch.randn(p.shape, generator=generator) for p in net.parameters()]
    found = []
    for step in range(steps):
        for index, (param, mean) in enumerate(zip(net.parameters(), signal, strict=True)):
            noise = torch.randn(param.shape, generator=generator)
            bad = size if index == 0 and step == at else 0.0
            param.grad = 0.3 * mean + noise + bad * noise.roll(1, 0)
        before = [param.detach().clone() for param in net.parameters()]
        optimizer.step()
        found.append(
            [(p.detach() - b).ravel() for p, b in zip(net.parameters(), before, strict=True)]
        )
    return found[at:], optimizer.watch.cut


def wrong(moved, right):
    """Steps with a move less than half in the right direction."""
    return sum(
        any(torch.cosine_similarity(a, b, 0) < 0.5 for a, b in zip(x, y, strict=True))
        for x, y in zip(moved, right, strict=True)
    )


@pytest.mark.row("R21")
@pytest.mark.parametrize("recipe", ["muon", "manifold_muon", "hybrid"])
def test_one_spike_turns_no_momentum(recipe):
    right, none = moves(recipe, 20.0, 0.0)
    assert none == 0
    unguarded, _ = moves(recipe, 0.0, 1e6)
    assert wrong(unguarded, right) >= 90  # of 100
    for size in (1e2, 1e6, 1e30):
        guarded, cut = moves(recipe, 20.0, size)
        assert cut == 1
        assert wrong(guarded, right) < 5


@pytest.mark.row("R21")
def test_nan_in_the_window_does_not_stop_the_guard():
    net, optimizer = make("muon", settings={"nonfinite": "skip"})
    optimizer.watch = Watch(spike=20.0)
    for step in range(120):
        feed(net)
        if step == 60:
            net.sq.weight.grad[0, 0] = math.nan
        if step == 61:
            net.sq.weight.grad *= 1e6
        optimizer.step()
    assert (optimizer.skipped, optimizer.watch.cut) == (1, 1)


@pytest.mark.row("R21")
def test_a_gradient_that_stays_large_is_followed():
    net, optimizer = make("muon")
    optimizer.watch = Watch(spike=20.0)
    for step in range(100):
        feed(net, 1e3 if step >= 40 else 1.0)
        optimizer.step()
    kept = len([p for p in net.parameters() if p.grad is not None and p.numel()])
    assert kept <= optimizer.watch.cut <= 20 * kept


def test_baselines_are_all_tried():
    assert set(BASELINES) - set(recipes()) == {"torch_muon"}
