import copy

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.norms import RMS, ColNorm, Sign


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(lr=0.05):
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

    groups = [Group(name, rules[name], lr, infos(names)) for name, names in members.items()]
    return HybridOptimizer(groups), params


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


def test_missing_gradients_are_zero_for_matrices_and_nothing_for_entries():
    optimizer, params = make()
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
    optimizer, params = make()
    set_grads(params, 1, scale=50.0)
    grads = {k: p.grad.clone() for k, p in params.items()}
    norm = optimizer.clip_entries_(1.0)
    assert norm == pytest.approx(grads["bias"].norm().item(), rel=1e-6)
    assert params["bias"].grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert all(torch.equal(params[k].grad, grads[k]) for k in params if k != "bias")


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
    with pytest.raises((UsageError, ValueError), match="more than one parameter group|two param"):
        HybridOptimizer([group, Group("b", Rule(Sign()), 0.1, [(info, p)])])


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
