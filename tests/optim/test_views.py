"""How weights are stored: every form against loops over the plain matrices, and against an SVD."""

import math

import pytest
import torch
from torch import nn

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
    Stiefel,
    fused,
    project_,
    stored,
)
from geon.optim.finishes import EvenRows, RowMoments
from geon.optim.norms import RMS, ColNorm, Sign
from geon.optim.views import View
from tests.optim.problems import gauss

HIDDEN = Role.HIDDEN
STORED = {
    "transposed": (
        ParamInfo("w", (12, 8), HIDDEN, transposed=True),
        lambda w: [w.T],
    ),
    "fused by columns": (
        ParamInfo("w", (8, 12), HIDDEN, splits=(5, 7), split_axis=1),
        lambda w: [w[:, :5], w[:, 5:]],
    ),
    "Conv1D, q, k and v": (
        ParamInfo("w", (8, 24), HIDDEN, splits=(8, 8, 8), heads=2, transposed=True),
        lambda w: [w[:, :8].T, w[:, 8:16].T, w[:, 16:].T],
    ),
    "transposed, fused inputs": (
        ParamInfo("w", (12, 8), HIDDEN, splits=(4, 8), split_axis=1, transposed=True),
        lambda w: [w[:4].T, w[4:].T],
    ),
    "grouped queries": (
        ParamInfo("w", (16, 8), HIDDEN, splits=(8, 4, 4), heads=(4, 2, 2)),
        lambda w: [w[:8], w[8:12], w[12:]],
    ),
    "head by head": (
        ParamInfo("w", (36, 8), HIDDEN, splits=(12, 12, 12), heads=3, interleaved=3),
        lambda w: [torch.cat([w[12 * h + 4 * p :][:4] for h in range(3)]) for p in range(3)],
    ),
    "group by group": (
        ParamInfo("w", (24, 8), HIDDEN, splits=(12, 6, 6), heads=(4, 2, 2), interleaved=2),
        lambda w: [
            torch.cat([w[:6], w[12:18]]),
            torch.cat([w[6:9], w[18:21]]),
            torch.cat([w[9:12], w[21:]]),
        ],
    ),
    "experts": (
        ParamInfo("w", (3, 10, 8), HIDDEN, splits=(6, 4)),
        lambda w: [part for expert in w for part in (expert[:6], expert[6:])],
    ),
    "experts, row by row, transposed": (
        ParamInfo("w", (2, 8, 10), HIDDEN, splits=(5, 5), transposed=True, interleaved=5),
        lambda w: [expert.T[at::2] for expert in w for at in (0, 1)],
    ),
    "kernel": (
        ParamInfo("w", (6, 4, 3, 3), HIDDEN, kernel=2),
        lambda w: [w.reshape(6, 36)],
    ),
    "kernel of groups": (
        ParamInfo("w", (6, 2, 5), HIDDEN, kernel=1, splits=(3, 3)),
        lambda w: [w[:3].reshape(3, 10), w[3:].reshape(3, 10)],
    ),
    "kernel by position": (
        ParamInfo("w", (6, 4, 3, 2), HIDDEN, kernel=2, by_position=True),
        lambda w: [w[:, :, i, j] for i in range(3) for j in range(2)],
    ),
}


def matrices(kind, weight):
    """The matrices in a whole weight as views, found without any of our code."""
    return STORED[kind][1](weight)


def opened(info, weight, per_head=False):
    """The same by ours."""
    flat = weight.reshape(info.matrix_shape)
    return [
        one
        for block in info.blocks(per_head)
        for many in block.view.open(flat[block.slices][None])
        for one in many
    ]


@pytest.mark.parametrize("kind", list(STORED))
def test_blocks_open_to_the_matrices_and_close_to_the_weight(kind):
    info = STORED[kind][0]
    weight = torch.arange(float(info.numel)).view(info.shape)
    found = opened(info, weight)
    assert [m.tolist() for m in found] == [m.tolist() for m in matrices(kind, weight)]
    back = torch.full(info.matrix_shape, math.nan)
    for block in info.blocks():
        boxes = weight.reshape(info.matrix_shape)[block.slices][None]
        twice = torch.cat([boxes, -boxes])  # a batch of two
        closed = block.view.close(block.view.open(twice), block.box)
        assert torch.equal(closed, twice)
        assert closed.is_contiguous()
        back[block.slices] = closed[0]
    assert torch.equal(back.view(info.shape), weight)


@pytest.mark.parametrize("kind", list(STORED))
def test_the_step_of_a_stored_weight_is_that_of_an_svd(kind):
    """Muon's step at 1e-6, with the radius of each matrix (d_out, d_in), in float64."""
    info = STORED[kind][0]
    param = nn.Parameter(gauss(info.shape, 1))
    param.grad = gauss(info.shape, 2)
    before = param.detach().double().clone()
    rule = Rule(Spectral(polar=Polar(accuracy=1e-6)), momentum=0.9)
    optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)])])
    optimizer.step()
    positions = math.prod(info.shape[2:]) if info.by_position else 1
    assert optimizer.plan.orthogonalized == len(matrices(kind, before))
    for old, new, grad in zip(
        *(matrices(kind, t) for t in (before, param.detach().double(), param.grad.double())),
        strict=True,
    ):
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        wanted = old - 0.1 * math.sqrt(old.shape[0] / old.shape[1]) / positions * (u @ vh)
        assert float((new - wanted).norm() / (wanted - old).norm()) < 1e-5


RULES = {
    "stiefel": Rule(Spectral(), Stiefel(), nesterov=True),
    "row moments": Rule(Spectral(), finishes=(RowMoments(0.9),), decay=0.1),
    "even rows": Rule(Spectral(), finishes=(EvenRows(),)),
    "colnorm": Rule(ColNorm()),
    "sign": Rule(Sign(), decay=0.1),
    "rms": Rule(RMS()),
}


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("kind", list(STORED))
def test_every_rule_steps_them_as_if_each_matrix_were_a_parameter(kind, rule):
    info, rule = STORED[kind][0], RULES[rule]
    param = nn.Parameter(gauss(info.shape, 1))
    project_(info, param, rule)
    size = 1 / math.prod(info.shape[2:]) if info.by_position else 1.0
    alone = [nn.Parameter(m.contiguous() / size) for m in matrices(kind, param.detach().clone())]
    apart = HybridOptimizer(
        [
            Group(f"g{i}", rule, 0.1, [(ParamInfo(f"m{i}", tuple(p.shape), HIDDEN), p)])
            for i, p in enumerate(alone)
        ]
    )
    optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)])])
    for step in range(3):
        param.grad = gauss(info.shape, 10 + step)
        for own, grad in zip(alone, matrices(kind, param.grad), strict=True):
            own.grad = grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        apart.step()
    for own, found in zip(alone, matrices(kind, param.detach()), strict=True):
        assert float((own.detach() * size - found).norm() / found.norm()) < 1e-5


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("grouped queries", [(w, 2) for w in (8, 4, 4)]),
        ("head by head", [(12, 4)] * 3),
        ("group by group", [(12, 3), (6, 3), (6, 3)]),
        ("Conv1D, q, k and v", [(8, 4)] * 3),
    ],
)
def test_heads_of_a_stored_weight_are_blocks_of_it(kind, heads):
    info = STORED[kind][0]
    weight = torch.arange(float(info.numel)).view(info.shape)
    wanted = [
        matrix[top : top + tall].tolist()
        for matrix, (rows, tall) in zip(matrices(kind, weight), heads, strict=True)
        for top in range(0, rows, tall)
    ]
    assert [m.tolist() for m in opened(info, weight, per_head=True)] == wanted
    assert all(block.view.plain or info.transposed for block in info.blocks(per_head=True))


@pytest.mark.parametrize("kind", ["head by head", "experts, row by row, transposed", "kernel"])
def test_state_of_a_stored_weight_is_saved_and_loaded(kind):
    info, rule = STORED[kind][0], RULES["row moments"]

    def run(steps, saved=None):
        param = nn.Parameter(gauss(info.shape, 1) if saved is None else saved[0].clone())
        optimizer = HybridOptimizer([Group("g", rule, 0.1, [(info, param)])])
        if saved is not None:
            optimizer.load_state_dict(saved[1])
        for step in steps:
            param.grad = gauss(info.shape, step)
            optimizer.step()
        return param.detach(), optimizer.state_dict()

    assert torch.equal(run(range(4))[0], run(range(2, 4), run(range(2)))[0])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 2), (3, 4, 5)])
def test_adamw_steps_weights_of_any_shape_as_torch_does(shape):
    ours, theirs = nn.Parameter(gauss(shape)), nn.Parameter(gauss(shape))
    info = ParamInfo("w", shape, Role.OTHER)
    optimizer = HybridOptimizer([Group("g", AdamW(decay=0.1), 0.1, [(info, ours)])])
    other = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        ours.grad = gauss(shape, step)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("said", "shape", "words"),
    [
        (stored(kernel=1), (6, 4, 3, 3), "w: kernel 1 of a weight of shape"),
        (stored("head", kernel=2), (6, 4, 3, 3), "role 'head': a convolution is hidden"),
        (stored(kernel=2, transposed=True), (6, 4, 3, 3), "may only have splits of d_out"),
        (stored(by_position=True), (6, 4), "by_position without a kernel"),
        (stored(), (6, 4, 3, 3), "a convolution says kernel=2"),
        (stored(interleaved=2), (6, 4), "interleaved and split_axis need splits"),
        (stored(split_axis=2), (6, 4), "split_axis 2 is not 0 or 1"),
        (fused(a=3, b=2), (6, 4), r"splits \(3, 2\) sum to 5, but d_out is 6"),
        (fused(a=3, b=3, transposed=True), (6, 4), "sum to 6, but d_out is 4"),
        (fused(a=3, b=3, axis=1), (6, 4), "sum to 6, but d_in is 4"),
        (fused(a=4, b=2, interleaved=4), (6, 4), "do not lie in 4 equal stretches"),
        (fused(a=2, b=2, axis=1, interleaved=2), (6, 4), "do not lie in 2 equal stretches"),
        (fused(a=4, b=2, heads=(2, 1, 1)), (6, 4), "give one number, or one for each of splits"),
        (fused(a=4, b=2, heads=(2, 4)), (6, 4), "2 rows do not divide into 4 heads"),
        (stored(head_axis=7), (6, 4), "head_axis 7 is not 0 or 1"),
        (fused(a=3, b=3, interleaved=-3), (6, 4), "interleaved -3 is not a number"),
    ],
)
def test_what_cannot_be_stored_so_is_refused_by_name(said, shape, words):
    with pytest.raises(UsageError, match=words):
        said.info("w", shape)


def test_words_for_people():
    with pytest.raises(UsageError, match=r"'haed' is not one of .* Did you mean 'head'\?"):
        stored("haed")
    for parts in ({}, {"q": 32.0}, {"a": ...}):
        with pytest.raises(UsageError, match="needs the size of each part"):
            fused(heads=2, **parts)
    with pytest.raises(UsageError, match="not turned. Did you mean 'transposed'"):
        stored(turned=True)
    assert fused(q=4, k=2, heads=[2, 1]).info("w", [6, 4]).heads == (2, 1)
    assert View(transposed=True, shares=(1, 1)).describe() == "transposed, interleaved"
    assert View(depth=3).describe() == "kernel"
    assert View().describe() == ""
