"""A step is a torch optimizer's: who moves, by which numbers; for every kind of rule."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from geon.errors import UsageError
from geon.optim import (
    AdamW,
    Group,
    HybridOptimizer,
    ParamInfo,
    Polar,
    Role,
    Rule,
    Spectral,
    classify,
)
from geon.optim.norms import ColNorm, Sign
from tests.optim.contract import (
    LR,
    RULES,
    STEEPEST,
    Net,
    changed,
    feed,
    gauss,
    grad,
    group,
    make,
    mixed,
    same,
    snap,
    train,
)

every_kind = pytest.mark.parametrize("kind", list(RULES))
every_steepest = pytest.mark.parametrize("kind", STEEPEST)


# Who moves.


@every_kind
def test_frozen_from_the_start_spends_nothing_and_moves_once_thawed(kind):
    net = Net(kind)
    start = net.a.detach().clone()
    net.a.requires_grad_(False)
    optimizer = HybridOptimizer([group(net)])
    net.a.grad = torch.ones_like(net.a)  # left over from before it was frozen
    for seed in range(2):
        net.b.grad = grad("b", net.b, seed)
        optimizer.step()
    assert torch.equal(net.a, start)
    assert net.a not in optimizer.state
    assert all(k.startswith("b.") for k in optimizer.state_tensors())
    net.a.requires_grad_(True)
    train(net, optimizer, [2])
    fresh, other = make(kind)
    train(fresh, other, [2])
    assert same(snap(net, optimizer, "a"), snap(fresh, other, "a"))
    assert not torch.equal(net.a, start)


@pytest.mark.parametrize("how", ["frozen", "grad is None"])
@every_kind
def test_steps_left_out_are_steps_that_never_were(kind, how):
    """No decay, no momentum, no step count; and the other parameter does not see it."""
    (net, optimizer), (less, fewer), (full, whole) = (make(kind) for _ in range(3))
    train(net, optimizer, [0, 1])
    before = snap(net, optimizer, "a")
    net.a.requires_grad_(how != "frozen")
    train(net, optimizer, [2, 3], "b")
    assert same(before, snap(net, optimizer, "a"))
    net.a.requires_grad_(True)
    train(net, optimizer, [4])
    train(less, fewer, [0, 1, 4])
    train(full, whole, range(5))
    assert same(snap(net, optimizer, "a"), snap(less, fewer, "a"))
    assert same(snap(net, optimizer, "b"), snap(full, whole, "b"))


@pytest.mark.parametrize("how", ["frozen", "grad is None"])
def test_left_out_as_torch_leaves_out(how):
    """Beside torch.optim.AdamW, and the average of torch.optim.Muon."""
    for kind in ("adamw", "muon"):
        net, ours = make(kind)
        twin = copy.deepcopy(net)
        rule = RULES[kind]
        if kind == "adamw":
            theirs = torch.optim.AdamW(twin.parameters(), LR, rule.betas, rule.eps, rule.decay)
        else:
            theirs = torch.optim.Muon(twin.parameters(), LR, momentum=rule.momentum)
        for seed, names in enumerate(["ab", "a", "b", "b", "ab", "a"]):
            for one, optimizer in ((net, ours), (twin, theirs)):
                for name, param in one.named_parameters():
                    param.requires_grad_(how != "frozen" or name in names)
                train(one, optimizer, [seed], names)
        for name in "ab":
            own, other = ours.state[net.get_parameter(name)], theirs.state[twin.get_parameter(name)]
            if kind == "adamw":
                assert own.keys() == other.keys()
                assert all(torch.equal(own[k], other[k]) for k in own)
                assert torch.equal(net.get_parameter(name), twin.get_parameter(name))
            else:
                torch.testing.assert_close(own["momentum"], other["momentum_buffer"])


@every_steepest
def test_coasting_parameters_move_on(kind):
    """As if their gradient were zero."""
    net, twin = Net(kind), Net(kind)
    coasting = HybridOptimizer([group(net, idle="coast")])
    zero = HybridOptimizer([group(twin)])
    train(net, coasting, [0])
    train(twin, zero, [0])
    before = net.a.detach().clone()
    train(net, coasting, [1], "b")
    feed(twin, 1)
    twin.a.grad.zero_()
    zero.step()
    assert same(snap(net, coasting), snap(twin, zero))
    assert not torch.equal(net.a, before)


@pytest.mark.parametrize("kind", [k for k in RULES if k != "rms"])
def test_adapters_train_beside_a_frozen_base(kind):
    net = nn.ModuleDict({k: nn.Linear(8, 8, bias=False) for k in ("base", "down", "up")})
    net["base"].requires_grad_(False)
    rule = RULES[kind]
    members = [(ParamInfo(n, (8, 8), Role.HIDDEN), p) for n, p in net.named_parameters()]
    optimizer = HybridOptimizer([Group("g", rule, LR, members)], project=True)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for seed in range(3):
        x = gauss((4, 8), seed)
        (net["base"](x) + net["up"](net["down"](x))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"down.weight", "up.weight"}
    matrices = isinstance(rule, Rule) and rule.orthogonalizes
    assert optimizer.plan.orthogonalized == (2 if matrices else 0)
    assert {k.rsplit(".", 1)[0] for k in optimizer.state_tensors()} == moved
    assert optimizer.state_bytes() > 0


# How a step is called.


@every_kind
def test_sparse_gradients_step_as_dense_ones(kind):
    (net, optimizer), (twin, other) = make(kind), make(kind)
    for seed in range(2):
        for one in (net, twin):
            feed(one, seed)
            for p in one.parameters():
                p.grad[::2] = 0
        for p in net.parameters():
            p.grad = p.grad.to_sparse(1)
        optimizer.step()
        other.step()
    assert same(snap(net, optimizer), snap(twin, other))


@pytest.mark.parametrize("rule", [Rule(ColNorm()), Rule(Sign()), AdamW()], ids=lambda r: r.name)
def test_sparse_embeddings_step_as_dense_ones(rule):
    """A row that is looked up twice has two entries in its gradient."""
    found = []
    for sparse in (False, True):
        table = nn.Embedding(10, 4, sparse=sparse)
        table.weight.data.copy_(gauss((10, 4)))
        (info,) = classify(table)
        optimizer = HybridOptimizer([Group("g", rule, LR, [(info, table.weight)])])
        for tokens in ([1, 3, 3], [2, 1, 1]):
            optimizer.zero_grad()
            (table(torch.tensor(tokens)) * gauss((3, 4), 1)).sum().backward()
            assert table.weight.grad.is_sparse == sparse
            optimizer.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(found[0], found[1])


@every_kind
def test_a_closure_is_called_with_gradients_on(kind):
    (net, optimizer), (twin, other) = make(kind), make(kind)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = net(0)
        loss.backward()
        return loss

    before = net(0).item()
    assert optimizer.step(closure).item() == before
    train(twin, other, [0])
    assert same(snap(net, optimizer), snap(twin, other))
    assert other.step() is None
    optimizer.zero_grad()
    assert net.a.grad is None
    optimizer.step(closure)
    optimizer.zero_grad(set_to_none=False)
    assert not net.a.grad.any()


def test_step_hooks_are_called():
    (net, optimizer), seen = make("muon"), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o.state[net.a])))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o.state[net.a])))
    train(net, optimizer, [0])
    assert [when for when, _ in seen] == ["before", "after"]


@every_kind
def test_a_grad_scaler_unscales_and_leaves_out_bad_steps(kind):
    (net, optimizer), (twin, other) = make(kind), make(kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(twin, other, [0])
    for seed in range(2):
        optimizer.zero_grad()
        scaler.scale(net(seed)).backward()
        if seed:
            net.a.grad.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert same(snap(net, optimizer), snap(twin, other))
    assert scaler.get_scale() == 512.0


# Numbers.


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [(k, "lr", 0.05) for k in RULES]
    + [(k, "momentum", 0.7) for k in STEEPEST]
    + [(k, "nesterov", not RULES[k].nesterov) for k in STEEPEST]
    + [(k, "weight_decay", 0.3) for k in RULES if k != "manifold muon"]
    + [("adamw", "betas", (0.8, 0.9)), ("adamw", "eps", 0.1)],
)
def test_a_number_changed_is_the_number_of_the_next_step(kind, key, value):
    net, optimizer = make(kind)
    train(net, optimizer, [0, 1])
    plain = copy.deepcopy((net, optimizer))
    twin, rule = copy.deepcopy(net), RULES[kind]
    if key != "lr":
        rule = changed(rule, **{{"weight_decay": "decay"}.get(key, key): value})
    made = HybridOptimizer([group(twin, rule, lr=value if key == "lr" else LR)])
    kept = made.param_groups[0][key]
    made.load_state_dict(optimizer.state_dict())
    made.param_groups[0][key] = kept
    optimizer.param_groups[0][key] = value
    for one, other in ((net, optimizer), (twin, made), plain):
        train(one, other, [2, 3])
    assert same(snap(net, optimizer), snap(twin, made))
    assert not torch.equal(net.a, plain[0].a)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [(k, "lr", v) for k in ("muon", "adamw") for v in (-0.1, math.nan, math.inf)]
    + [("muon", "momentum", v) for v in (1.0, -0.1, math.nan)]
    + [(k, "weight_decay", v) for k in ("muon", "adamw") for v in (-0.1, math.nan)]
    + [("manifold muon", "weight_decay", 0.1)]
    + [("adamw", "betas", v) for v in ((1.0, 0.9), (0.9, math.nan))]
    + [("adamw", "eps", v) for v in (-1e-8, math.nan)],
)
def test_a_bad_number_is_refused_at_the_step_and_changes_nothing(kind, key, value):
    net, optimizer = mixed()
    train(net, optimizer, [0])
    before = snap(net, optimizer)
    (bad,) = [one for one in optimizer.param_groups if one["name"] == kind]
    good, bad[key] = bad[key], value
    with pytest.raises(UsageError, match=f"group '{kind}'"):
        train(net, optimizer, [1])
    assert same(before, snap(net, optimizer))
    bad[key] = good
    train(net, optimizer, [1])
    twin, other = mixed()
    train(twin, other, [0, 1])
    assert same(snap(net, optimizer), snap(twin, other))


@every_kind
def test_warm_up_from_zero_averages_and_does_not_move(kind):
    """To the last bit, in bf16 too; the average goes on as torch.optim's does."""
    for dtype in (torch.float32, torch.bfloat16):
        net, optimizer = make(kind, dtype)
        twin = copy.deepcopy(net)
        theirs = torch.optim.AdamW(twin.parameters(), LR)
        warm = LambdaLR(optimizer, lambda step: min(1.0, step / 2))
        LambdaLR(theirs, lambda step: min(1.0, step / 2))
        before = net.a.detach().clone()
        for one, other in ((net, optimizer), (twin, theirs)):
            for p in one.parameters():
                p.grad = torch.zeros_like(p)
            start = snap(net, optimizer)
            other.step()
            assert same(start, snap(net, optimizer))
        theirs.state.clear()
        train(net, optimizer, [0])
        assert torch.equal(net.a, before)
        state = optimizer.state[net.a]
        if kind == "adamw":
            betas = RULES[kind].betas
            theirs = torch.optim.AdamW(twin.parameters(), 0.0, betas)
            train(twin, theirs, [0])
            assert all(torch.equal(state[k], v) for k, v in theirs.state[twin.a].items())
        else:
            folded = (1 - RULES[kind].momentum) * grad("a", net.a, 0).float()
            torch.testing.assert_close(state["momentum"], folded)
        start = snap(net, optimizer)
        for p in net.parameters():
            p.grad.zero_()
        optimizer.step()
        assert same(start, snap(net, optimizer))
        warm.step()
        assert optimizer.param_groups[0]["lr"] == LR / 2
        train(net, optimizer, [1])
        assert not torch.equal(net.a, before)


# Gradients that cannot be stepped.


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@every_kind
def test_a_gradient_that_is_not_finite_changes_nothing(kind, bad):
    for nonfinite in ("raise", "skip"):
        net, optimizer = make(kind, nonfinite=nonfinite)
        train(net, optimizer, [0])
        before = snap(net, optimizer)
        feed(net, 1)
        net.b.grad.view(-1)[-1] = bad
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match=r"'b' and 0 more is not finite"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.skipped == (nonfinite == "skip")
        assert same(before, snap(net, optimizer))
        train(net, optimizer, [2])
        twin, other = make(kind)
        train(twin, other, [0, 2])
        assert same(snap(net, optimizer), snap(twin, other))


def test_keller_muon_steps_as_torch_optim_muon():
    """torch's five steps are in bf16."""
    net = Net("muon")
    twin = copy.deepcopy(net)
    rule = Rule(Spectral("muon", Polar("keller", 5)), nesterov=True, decay=0.1)
    ours = HybridOptimizer([group(net, rule)])
    theirs = torch.optim.Muon(twin.parameters(), LR, 0.1, rule.momentum)
    start = net.a.detach().clone()
    train(net, ours, range(5))
    train(twin, theirs, range(5))
    assert (net.a - twin.a).norm() < 0.02 * (net.a - start).norm()
