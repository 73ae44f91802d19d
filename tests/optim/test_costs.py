"""Costs of rules: products, words and operators beside what PyTorch dispatches in a real step."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geon.benches.count_operators import VIEWS
from geon.optim import (
    Group,
    HybridOptimizer,
    Ladder,
    ParamInfo,
    Polar,
    Precision,
    Role,
    Rule,
    Spectral,
    Stiefel,
)
from geon.optim.costs import Cost, products
from geon.optim.manifolds import DGram, FrobeniusSphere, SpectralBall

BF16 = Polar(precision=Precision.BF16)
RULES = {
    "muon fp32": Rule(Spectral("muon", Polar("keller", 5)), nesterov=True, decay=0.1),
    "muon": Rule(Spectral("muon", Polar("keller", 5, Precision.BF16)), nesterov=True, decay=0.1),
    "normuon": Rule(Spectral(polar=BF16), nesterov=True, decay=0.1, second_moment=0.95),
    "ball": Rule(Spectral(polar=BF16), SpectralBall(4.0), nesterov=True, even_rows=True),
    "dgram": Rule(Spectral(polar=BF16), DGram(), nesterov=True),
    "sphere": Rule(Spectral(polar=BF16), FrobeniusSphere(), nesterov=True),
    "lgm gram": Rule(Spectral(), Stiefel(), nesterov=True),
    "lgm rect": Rule(Spectral(polar=BF16), Stiefel(), nesterov=True),
    "lgm rect, refined": Rule(
        Spectral(polar=BF16), Stiefel(), nesterov=True, ladder=Ladder(refine=1)
    ),
    "oneshot": Rule(Spectral(polar=BF16), Stiefel(), nesterov=True, ladder=Ladder("oneshot")),
}
MATRICES = 3
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Count(TorchDispatchMode):
    """FLOPs of products by dtype, words of everything else, and operators, views apart."""

    def __init__(self):
        super().__init__()
        self.flops, self.words, self.operators = Counter(), 0.0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, name = str(func).split(".")[:2]
        if space == "profiler" or name in VIEWS:
            return out
        self.operators += 1
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            self.flops[KINDS[a.dtype]] += 2 * a.numel() * b.shape[-1]
        else:
            self.words += words(args) + words(out)
        return out


def words(found):
    if isinstance(found, torch.Tensor):
        return found.numel() * found.element_size() / 4
    return sum(map(words, found)) if isinstance(found, list | tuple) else 0


def counted(rule, shape):
    """What the second step of a few matrices dispatches."""
    generator, pairs = torch.Generator().manual_seed(0), []
    for index in range(MATRICES):
        weight = Spectral().init(shape, generator)
        if rule.manifold.constrains:
            # The ball's starting point is on its boundary, where a cap runs that is seldom needed.
            inside = 0.3 if isinstance(rule.manifold, SpectralBall) else 1.0
            weight = rule.manifold.random_point(shape, generator) * inside
        param = nn.Parameter(weight)
        param.grad = torch.randn(shape, generator=generator)
        pairs.append((ParamInfo(f"w{index}", shape, Role.HIDDEN), param))
    optimizer = HybridOptimizer([Group("hidden", rule, 0.02, pairs)])
    optimizer.step()
    with Count() as count:
        optimizer.step()
    return count


@pytest.mark.parametrize("shape", [(96, 96), (384, 96)], ids=["square", "tall"])
@pytest.mark.parametrize("name", RULES)
def test_costs_are_what_a_step_dispatches(name, shape):
    rule = RULES[name]
    found, told = counted(rule, shape), rule.cost(shape).batch(MATRICES)
    assert told.bf16 == found.flops["bf16"]
    # A Cholesky factor counts as a product in part, and is none.
    assert told.fp32 == pytest.approx(found.flops["fp32"], rel=0.01, abs=MATRICES * 96**3)
    assert told.words == pytest.approx(found.words, rel=0.15)
    # Each step asks once whether gradients are finite, whatever the rules.
    assert told.operators == pytest.approx(found.operators, rel=0.15, abs=4)
    assert rule.cost(shape) == rule.cost(shape[::-1])


def test_a_gpu_takes_bf16_and_the_rectangular_form():
    """Formulas by hand: n = 4, 16 x 4; six steps are 6 (4 r + 2) n^3 FLOPs in each polar factor."""
    cost, polar = Rule(Spectral(), Stiefel()).cost((16, 4), "cuda"), 6 * (4 * 4 + 2) * 64
    # U'G, what is across U, Z Z, the factor's correction, V L', the projection; half a cubic step.
    assert cost.bf16x3 == (5 * 4 + 2) * 2 * 64 + 2 * 4 * 64
    # What steers Q and V, the equation along U, V'V; the Cholesky factor counts as a product.
    assert cost.bf16 == 2 * polar + round((5 * 4 + 6 + 1 / 6) * 2 * 64) + 2 * 4 * 64
    assert cost.fp32 == 0
    told = Rule(Spectral(), Stiefel(), ladder=Ladder(precision=Precision.FP32))
    plain = told.cost((16, 4), "cuda")
    assert plain.bf16 == 2 * polar + 2 * 4 * 64
    assert plain.fp32 == round((10 * 4 + 8 + 1 / 6) * 2 * 64)
    tripled = Rule(Spectral(polar=Polar(precision=Precision.BF16X3))).cost((16, 4), "cuda")
    assert (tripled.bf16x3, tripled.flops) == (polar, 3 * polar)
    chosen = Rule(Spectral(), Stiefel(), ladder=Ladder(form="gram", precision=Precision.BF16X3))
    found = chosen.cost((16, 4), "cuda")
    assert found.fp32 == 0 < found.bf16 == 2 * 4 * 64 < found.bf16x3


def test_a_batch_takes_the_operators_of_one_matrix():
    one = products(10, "bf16x3", words=5, operators=3) + Cost(fp32=2)
    assert one.batch(4) == Cost(fp32=8, bf16x3=40, words=20, operators=3)
    assert one.times(2) == Cost(fp32=4, bf16x3=20, words=10, operators=6)
    assert one.flops == 2 + 3 * 10
