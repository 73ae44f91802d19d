import copy

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.finishes import RowMoments
from geon.optim.norms import RMS, ColNorm, RowNorm, Sign


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


MUON = Rule(Spectral(), decay=0.1, radius=2.0)
BLOCKS = {
    "rows": (
        ParamInfo("q", (12, 12), Role.HIDDEN, heads=3),
        [(slice(4 * i, 4 * i + 4), slice(0, 12)) for i in range(3)],
    ),
    "columns": (
        ParamInfo("o", (12, 12), Role.HIDDEN, heads=3, head_axis=1),
        [(slice(0, 12), slice(4 * i, 4 * i + 4)) for i in range(3)],
    ),
    "fused": (
        ParamInfo("qkv", (36, 12), Role.HIDDEN, (12, 12, 12), 3),
        [(slice(4 * i, 4 * i + 4), slice(0, 12)) for i in range(9)],
    ),
    "no heads": (ParamInfo("up", (24, 12), Role.HIDDEN), [(slice(0, 24), slice(0, 12))]),
}


@pytest.mark.parametrize(
    "rule",
    [MUON, Rule(Spectral(), Stiefel(2.0), nesterov=True), Rule(RowNorm())],
    ids=["muon", "stiefel", "rownorm"],
)
@pytest.mark.parametrize("kind", list(BLOCKS))
def test_heads_are_stepped_as_if_each_were_a_parameter(kind, rule):
    """Beside a loop over slices: the whole's factor is 1, so its scale is 1 over the block's."""
    info, slices = BLOCKS[kind]
    lr, param = 0.05, nn.Parameter(gauss(info.shape, 1))
    scale = {"rows": 3**0.5, "columns": 3**-0.5, "fused": 3**0.5, "no heads": 1.0}[kind]
    if isinstance(rule.norm, RowNorm):
        # A row of length 1/sqrt(12) is cut into three, of 1/sqrt(3) times that each.
        scale = {"columns": 1 / 3}.get(kind, 1.0)
    blocks, buffers = [], []
    with torch.no_grad():
        for s in slices:
            if rule.manifold.constrains:
                param[s] = rule.manifold.project(param[s]) * scale
            blocks.append(param[s].clone())
            buffers.append(torch.zeros_like(blocks[-1]))
    optimizer = HybridOptimizer([Group("g", rule, lr, [(info, param)], per_head=True)])
    assert len(optimizer.plan.matrices) == len(slices)
    for step in range(4):
        param.grad = gauss(info.shape, 100 + step)
        for i, s in enumerate(slices):
            update = rule.average(param.grad[s].clone(), buffers[i])
            if rule.manifold.constrains:
                direction = rule.solve(update, blocks[i] / scale).direction
                blocks[i] = rule.move(blocks[i] / scale, direction, lr) * scale
            else:
                blocks[i] = rule.move(blocks[i], scale * rule.solve(update, None).direction, lr)
        optimizer.step()
    for block, s in zip(blocks, slices, strict=True):
        torch.testing.assert_close(param.detach()[s], block, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "columns", "fused"])
def test_heads_keep_the_singular_values_of_a_whole_orthogonal_matrix(kind):
    """Which is a feasible point, and where training may start."""
    info, slices = BLOCKS[kind]
    manifold = Stiefel(1.5)
    parts = [manifold.project(gauss((12, 12), seed)) for seed in range(info.shape[0] // 12)]
    param = nn.Parameter(torch.cat(parts))
    start = param.detach().clone()
    rule = Rule(Spectral(), manifold)
    optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)], per_head=True)])
    for step in range(20):
        param.grad = gauss(info.shape, 200 + step)
        optimizer.step()
        for s in slices:
            values = torch.linalg.svdvals(param.detach()[s])
            torch.testing.assert_close(values, torch.full((4,), 1.5), atol=2e-4, rtol=0)
    assert (param - start).norm() > 0.5 * start.norm()
    # The heads left each other alone: the whole is not orthogonal any more.
    assert rule.manifold.residual(param.detach()[:12]) > 0.1


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_heads_without_a_gradient_stay_exactly(kind):
    """Though a scale that is no power of two would round them."""
    info, slices = BLOCKS[kind]
    rule = Rule(Spectral(), Stiefel())
    param = nn.Parameter(rule.manifold.project(gauss((12, 12), 1)))
    start = param.detach().clone()
    optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)], per_head=True)])
    param.grad = torch.zeros_like(param)
    param.grad[slices[1]] = gauss((12, 12), 2)[slices[1]]
    optimizer.step()
    assert torch.equal(param[slices[0]], start[slices[0]])
    assert torch.equal(param[slices[2]], start[slices[2]])
    assert not torch.equal(param[slices[1]], start[slices[1]])


@pytest.mark.parametrize("kind", ["rows", "columns", "fused"])
def test_normuon_keeps_a_second_moment_for_each_row_of_each_head(kind):
    info, slices = BLOCKS[kind]
    rule = Rule(Spectral(scale="none"), second_moment=0.9)
    param = nn.Parameter(gauss(info.shape, 1))
    optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)], per_head=True)])
    moments = optimizer.state[param]["second_moment"]
    assert moments.shape == ((3, 12) if kind == "columns" else info.shape[:1])
    blocks = [param.detach()[s].clone() for s in slices]
    buffers = [torch.zeros_like(b) for b in blocks]
    seconds = [torch.zeros(len(b)) for b in blocks]
    for step in range(3):
        param.grad = gauss(info.shape, 100 + step)
        for i, s in enumerate(slices):
            update = rule.average(param.grad[s].clone(), buffers[i])
            direction = rule.solve(update, None).direction
            direction, seconds[i] = RowMoments(0.9).direct_with(direction, seconds[i])
            blocks[i] = rule.move(blocks[i], direction, 0.1)
        optimizer.step()
    for block, s in zip(blocks, slices, strict=True):
        torch.testing.assert_close(param.detach()[s], block, atol=2e-6, rtol=1e-5)
    assert moments.flatten().tolist() == pytest.approx(torch.cat(seconds).tolist(), rel=1e-4)


def test_a_whole_matrix_of_the_shape_of_a_head_keeps_its_own_scale():
    info, slices = BLOCKS["rows"]
    other = ParamInfo("small", (4, 12), Role.HIDDEN, heads=1)
    params = [nn.Parameter(torch.zeros(i.shape)) for i in (info, other)]
    rule = Rule(Spectral())
    group = Group("g", rule, 0.1, list(zip((info, other), params, strict=True)), per_head=True)
    optimizer = HybridOptimizer([group])
    params[0].grad = gauss((12, 12), 1)
    params[1].grad = params[0].grad[slices[0]].clone()
    optimizer.step()
    torch.testing.assert_close(params[0].detach()[slices[0]], 3**0.5 * params[1].detach())


def test_per_head_is_refused_where_there_are_no_matrices():
    with pytest.raises(UsageError, match=r"group 'rest': per_head .* rule=adamw"):
        Group("rest", AdamW(), 0.1, [], per_head=True)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((12, 8), {"heads": 5}, "w: 12 rows do not divide into 5 heads"),
        ((12, 8), {"heads": 3, "head_axis": 1}, "w: 8 columns do not divide into 3 heads"),
        ((12, 8), {"heads": 3, "splits": (6, 4, 2)}, "w: 4 rows do not divide into 3 heads"),
        ((12, 8), {"heads": 3, "head_axis": 2}, "w: 3 heads on axis 2"),
        ((12, 8), {"heads": -1}, "w: -1 heads"),
        ((12, 8, 2), {"heads": 2}, r"heads .* of a weight of shape \(12, 8, 2\)"),
    ],
)
def test_heads_must_divide_a_matrix(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ParamInfo("w", shape, Role.BIAS if len(shape) == 3 else Role.HIDDEN, **options)
