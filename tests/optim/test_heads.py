"""Heads' blocks are stepped as matrices of their own."""

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.finishes import RowMoments
from geon.optim.norms import RowNorm
from tests.optim.test_rules_against_references import gauss

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
