import copy

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.manifolds import Euclidean
from geon.optim.norms import RMS, ColNorm, Sign


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(lr=0.05, idle="skip", **options):
    """One parameter of every kind."""
    manifold = Stiefel()
    draws = {
        "embed": (Role.EMBEDDING, gauss((20, 8), 1)),
        "tall": (Role.HIDDEN, manifold.project(gauss((16, 8), 2))),
        "square": (Role.HIDDEN, manifold.project(gauss((8, 8), 3))),
        "head": (Role.HEAD, gauss((20, 8), 4)),
        "gain": (Role.GAIN, torch.ones(8)),
        "bias": (Role.BIAS, torch.zeros(8)),
    }
    params = {name: nn.Parameter(t.clone()) for name, (_, t) in draws.items()}
    rules = {
        "embed": Rule(ColNorm(), momentum=0.9),
        "hidden": Rule(Spectral(), manifold, nesterov=True),
        "head": Rule(Sign(), radius=10.0),
        "gain": Rule(RMS()),
        "rest": AdamW(),
    }
    members = {
        "embed": ["embed"],
        "hidden": ["tall", "square"],
        "head": ["head"],
        "gain": ["gain"],
        "rest": ["bias"],
    }

    def infos(names):
        return [(ParamInfo(n, tuple(params[n].shape), draws[n][0]), params[n]) for n in names]

    def group(name, names):
        own = idle if isinstance(rules[name], Rule) else "skip"
        return Group(name, rules[name], lr, infos(names), idle=own)

    return HybridOptimizer([group(*item) for item in members.items()], **options), params


def set_grads(params, seed, scale=1.0):
    for i, p in enumerate(params.values()):
        p.grad = scale * gauss(p.shape, 1000 * seed + i)


def snapshot(optimizer, params):
    state = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    return {k: p.detach().clone() for k, p in params.items()} | state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_every_parameter_moves_and_the_plan_counts_what_is_orthogonalized():
    optimizer, params = make()
    before = snapshot(optimizer, params)
    set_grads(params, 1)
    optimizer.step()
    after = snapshot(optimizer, params)
    assert all(not torch.equal(before[k], after[k]) for k in params)
    assert optimizer.plan.orthogonalized == 2


def test_zero_gradient_at_lr_zero_is_an_exact_no_op():
    """What torch's get_optimizer_state_dict does to a fresh optimizer, and what it asks for."""
    optimizer, params = make()
    set_grads(params, 1)
    optimizer.step()
    before = snapshot(optimizer, params)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(before, snapshot(optimizer, params))


def test_zero_gradients_move_no_fresh_matrix():
    optimizer, params = make()
    before = {k: params[k].detach().clone() for k in ("embed", "tall", "square", "head", "gain")}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(before[k], params[k]) for k in before)


def test_directions_do_not_see_the_gradient_scale():
    (a, pa), (b, pb) = make(), make()
    for step in range(5):
        set_grads(pa, step)
        set_grads(pb, step, scale=1e-6)
        a.step()
        b.step()
    for name in ("embed", "tall", "square", "head", "gain"):
        torch.testing.assert_close(pa[name], pb[name], atol=2e-5, rtol=0)


def test_state_dict_round_trip_continues_exactly(tmp_path):
    a, pa = make()
    for step in range(3):
        set_grads(pa, step)
        a.step()
    torch.save({"optim": a.state_dict(), "params": pa}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    b, pb = make()
    with torch.no_grad():
        for name, p in pb.items():
            p.copy_(saved["params"][name])
    b.load_state_dict(saved["optim"])
    for step in range(3, 6):
        for optimizer, params in ((a, pa), (b, pb)):
            set_grads(params, step)
            optimizer.step()
    assert same(snapshot(a, pa), snapshot(b, pb))


def test_torch_checkpoint_helper_changes_nothing():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    class Holder(nn.Module):
        def __init__(self, params):
            super().__init__()
            for name, p in params.items():
                self.register_parameter(name, p)

    optimizer, params = make()
    before = snapshot(optimizer, params)
    state = get_optimizer_state_dict(Holder(params), optimizer)
    assert same(before, snapshot(optimizer, params))
    assert set(state["state"]) == set(params)


def test_missing_gradients_change_nothing():
    optimizer, params = make()
    set_grads(params, 1)
    optimizer.step()
    before = snapshot(optimizer, params)
    for p in params.values():
        p.grad = None
    optimizer.step()
    assert same(before, snapshot(optimizer, params))


def test_missing_gradients_are_zero_for_matrices_that_coast_and_nothing_for_entries():
    optimizer, params = make(idle="coast")
    set_grads(params, 1)
    optimizer.step()
    before = snapshot(optimizer, params)
    for p in params.values():
        p.grad = None
    optimizer.step()
    after = snapshot(optimizer, params)
    assert torch.equal(before["bias"], after["bias"])
    assert not torch.equal(before["tall"], after["tall"])
    torch.testing.assert_close(after["tall.momentum"], 0.95 * before["tall.momentum"])


def test_clip_touches_only_entries_and_is_exact():
    """Beside torch's own clipping and AdamW; scales on both sides of the bound."""
    (optimizer, params), (free, loose) = make(max_norm=1.0), make()
    assert optimizer.entry_norm is None
    twin = nn.Parameter(params["bias"].detach().clone())
    theirs = torch.optim.AdamW([twin], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step, scale in enumerate((50.0, 1e-3, 5.0)):
        set_grads(params, step, scale)
        set_grads(loose, step, scale)
        grads = {k: p.grad.clone() for k, p in params.items()}
        twin.grad = grads["bias"].clone()
        optimizer.step()
        free.step()
        norm = torch.nn.utils.clip_grad_norm_([twin], 1.0)
        theirs.step()
        assert optimizer.entry_norm.item() == pytest.approx(grads["bias"].norm().item(), rel=1e-6)
        torch.testing.assert_close(optimizer.entry_norm, norm)
        assert params["bias"].grad.norm().item() == pytest.approx(min(1.0, norm.item()), rel=1e-4)
        torch.testing.assert_close(params["bias"], twin)
        assert all(torch.equal(params[k].grad, grads[k]) for k in params if k != "bias")
    assert free.entry_norm is None
    assert not torch.allclose(loose["bias"], params["bias"], atol=1e-4)
    own, other = snapshot(optimizer, params), snapshot(free, loose)
    assert all(torch.equal(own[k], other[k]) for k in own if not k.startswith("bias"))


def test_clip_is_of_all_entries_together():
    """Groups of AdamW share one norm."""
    params = [nn.Parameter(gauss((5,), i)) for i in range(2)]
    groups = [
        Group(f"g{i}", AdamW(), 0.1, [(ParamInfo(f"w{i}", (5,), Role.BIAS), p)])
        for i, p in enumerate(params)
    ]
    optimizer = HybridOptimizer(groups, max_norm=0.5)
    grads = [gauss((5,), 10 + i) for i in range(2)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    norm = torch.cat(grads).norm()
    torch.testing.assert_close(optimizer.entry_norm, norm)
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, g * (0.5 / (norm + 1e-6)))


@pytest.mark.parametrize("bound", [-1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_number_is_refused(bound):
    with pytest.raises(UsageError, match="max_norm .* must be finite and 0 or more"):
        make(max_norm=bound)


def test_momentum_of_a_manifold_weight_is_ambient():
    optimizer, params = make()
    set_grads(params, 1)
    grad = params["tall"].grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params["tall"]]["momentum"], 0.05 * grad)


@pytest.mark.parametrize("kind", ["hidden", "head"])
def test_bf16_weights_are_stepped_with_fp32_momenta(kind):
    rule = Rule(Spectral(), Stiefel()) if kind == "hidden" else Rule(Sign(), radius=10.0)
    start = Stiefel().project(gauss((16, 8), 2))
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        w = nn.Parameter(start.to(dtype, copy=True))
        info = ParamInfo("w", (16, 8), Role.HIDDEN)
        optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, w)])])
        w.grad = gauss((16, 8), 3).to(dtype)
        optimizer.step()
        assert w.dtype == dtype
        assert optimizer.state[w]["momentum"].dtype == torch.float32
        steps[dtype] = w.detach().float() - start
    difference = (steps[torch.float32] - steps[torch.bfloat16]).norm()
    assert difference / steps[torch.float32].norm() < 0.06


def test_a_parameter_in_two_groups_is_refused():
    p = nn.Parameter(gauss((8, 4)))
    info = ParamInfo("w", (8, 4), Role.HIDDEN)
    group = Group("a", Rule(Spectral()), 0.1, [(info, p)])
    with pytest.raises(UsageError, match="parameter 'w' is in two param groups: 'a' and 'b'"):
        HybridOptimizer([group, Group("b", Rule(Sign()), 0.1, [(info, p)])])


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("manifold", [Euclidean(), Stiefel()])
def test_polar_factors_are_for_matrices_between_activations(role, manifold):
    """Rows of an embedding are looked up: the polar factor of a gradient would mix them."""
    p = nn.Parameter(manifold.project(gauss((8, 4))))
    group = Group("g", Rule(Spectral(), manifold), 0.1, [(ParamInfo("w", (8, 4), role), p)])
    if role in (Role.HIDDEN, Role.HEAD):
        assert HybridOptimizer([group]).plan.orthogonalized == 1
        return
    with pytest.raises(UsageError, match=rf"group 'g': parameter 'w' of role '{role}' and shape"):
        HybridOptimizer([group])
    HybridOptimizer([Group("g", Rule(Sign()), 0.1, group.params)])


def test_training_reaches_the_bottom_of_a_quadratic():
    target = Stiefel().project(gauss((16, 8), 9))
    manifold = Stiefel()
    w = nn.Parameter(manifold.project(gauss((16, 8), 2)))
    info = ParamInfo("w", (16, 8), Role.HIDDEN)
    rule = Rule(Spectral(), manifold, momentum=0.9)
    optimizer = HybridOptimizer([Group("hidden", rule, 0.1, [(info, w)])])
    first = None
    for step in range(200):
        loss = (w - target).square().sum()
        first = first or copy.copy(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.set_lr(1 - step / 200)
        optimizer.step()
    assert loss.item() < 1e-3 * first


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_gradients_of_any_finite_size_are_taken(size):
    """Whose squares leave the range of fp32, so that a norm is 0 or infinite."""
    w = nn.Parameter(torch.zeros(6, 4))
    group = Group("g", Rule(Spectral()), 0.0, [(ParamInfo("w", (6, 4), Role.HIDDEN), w)])
    optimizer = HybridOptimizer([group])
    w.grad = size * gauss((6, 4), 1)
    optimizer.step()
    assert optimizer.state[w]["momentum"].any()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert torch.linalg.matrix_norm(w, 2) > 0.05
