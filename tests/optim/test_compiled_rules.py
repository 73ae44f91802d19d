"""Directions by code that torch.compile makes: as without it, and made once a rule and shape."""

import pytest
import torch
from torch._dynamo.utils import counters

from geon.errors import UsageError
from geon.optim import (
    Group,
    HybridOptimizer,
    Ladder,
    ParamInfo,
    Polar,
    Role,
    Rule,
    Spectral,
    Stiefel,
    build,
)
from geon.optim.linalg import Precision
from geon.optim.manifolds import SpectralBall

BF16 = Spectral(polar=Polar(precision=Precision.BF16))
RECT = Ladder(form="rect", precision=Precision.BF16X3)
RULES = {
    "muon": ({"norm": Spectral()}, 1e-5),
    "even rows in a ball": ({"norm": Spectral(), "manifold": SpectralBall(4.0)}, 1e-5),
    "manifold muon": ({"norm": BF16, "manifold": Stiefel(), "ladder": RECT}, 2e-2),
}
SHAPES = {"a": (64, 16), "b": (16, 64), "c": (32, 32), "d": (32, 32)}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    """Graphs as dynamo finds them, run by torch: whether they are found once is the question."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="aot_eager", **k))
    from geon.optim import rule

    rule._compiled_solve.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    rule._compiled_solve.cache_clear()
    torch._dynamo.reset()


def trained(steps, compiled, **settings):
    rule = Rule(**settings, compiled=compiled)
    params = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(seed)
        start = (
            rule.manifold.random_point(shape, generator)
            if rule.manifold.constrains
            else torch.randn(shape, generator=generator)
        )
        params.append((ParamInfo(name, shape, Role.HIDDEN), torch.nn.Parameter(start)))
    optimizer = HybridOptimizer([Group("hidden", rule, 0.05, params)])
    generator = torch.Generator().manual_seed(9)
    for step in range(steps):
        for _, param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.param_groups[0]["momentum"] = 0.9 + 0.001 * step
        optimizer.step()
    return [param.detach() for _, param in params]


@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_without_it_and_nothing_is_compiled_again(name):
    settings, tolerance = RULES[name]
    plain = trained(20, False, **settings)
    assert not counters["stats"]["unique_graphs"]
    found = trained(20, True, **settings)
    assert counters["stats"]["unique_graphs"] == 3  # of shapes; the rate and the momentum change
    assert not counters["graph_break"]
    for a, b in zip(found, plain, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_the_config_asks_for_it_and_it_is_refused_where_nothing_would_be_compiled():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = build(model, "muon", settings={"compile": True})
    assert all(rule.compiled for rule in optimizer.rules.values() if isinstance(rule, Rule))
    with pytest.raises(UsageError, match="optim.compile=true has no effect"):
        build(model, "adamw", settings={"compile": True})
