"""Other packages' optimizers as rules: each beside its own class, run without ours."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import BASELINES, Baseline, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral
from geon.optim.norms import Sign
from tests.optim.test_rules_against_references import gauss, one_group, run

WEIGHTS = [(16, 8), (8, 8)]
OWN = {"sophia", "torch_muon"}
"""Steps that need more than a gradient, or a weight that is a matrix; tested apart."""


def classes(name):
    origin = BASELINES[name]
    package = torch.optim if origin.package == "torch.optim" else pytorch_optimizer
    return getattr(package, origin.cls), dict(origin.settings)


@pytest.mark.parametrize("name", sorted(set(BASELINES) - OWN))
def test_a_baseline_is_its_class(name):
    starts = [gauss(shape, i) for i, shape in enumerate(WEIGHTS)]
    ours, mine = one_group(Baseline(name, {"weight_decay": 0.01}), starts, 0.01)
    theirs = [nn.Parameter(w.clone()) for w in starts]
    cls, settings = classes(name)
    reference = cls(theirs, lr=0.01, **{**settings, "weight_decay": 0.01})
    run(ours, mine, steps=12, scale=1.0)
    run(reference, theirs, steps=12, scale=1.0)
    for a, b, start in zip(mine, theirs, starts, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)


def test_the_learning_rate_of_the_group_is_the_one_that_steps():
    ours, (mine,) = one_group(Baseline("sgd"), [gauss((4, 3), 1)], 0.5)
    ours.set_lr(0.1)
    before, mine.grad = mine.detach().clone(), torch.ones(4, 3)
    ours.step()
    assert torch.allclose(mine, before - 0.05)


def test_sophia_steps_by_the_curvature_that_it_is_given():
    rule = Baseline("sophia")
    assert rule.origin.curvature_every == 10
    ours, (mine,) = one_group(rule, [gauss((4, 3), 1)], 0.1)
    before, grad, diagonal = mine.detach().clone(), gauss((4, 3), 2), gauss((4, 3), 3).square()
    rule.curvature = {mine: diagonal}
    mine.grad = grad.clone()
    ours.step()
    # Algorithm 3 of arXiv 2305.14342, with gamma folded into the clip, without bias correction.
    wanted = ((1 - 0.965) * grad / ((1 - 0.99) * diagonal).clamp_min(1e-12)).clamp(-0.05, 0.05)
    assert torch.allclose(mine, before - 0.1 * wanted, atol=1e-7)
    assert rule.curvature is None


def test_sign_descent_is_that_of_another_package():
    start = gauss((16, 8), 1)
    ours, (mine,) = one_group(Rule(Sign(), momentum=0.9), [start], lr=0.08)
    theirs = nn.Parameter(start.clone())
    reference = pytorch_optimizer.SignSGD([theirs], lr=0.08 / 8, momentum=0.9)
    run(ours, [mine], scale=1.0)
    run(reference, [theirs], scale=1.0)
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_baseline_and_a_rule_step_side_by_side_and_the_bytes_are_counted():
    matrix, vector = nn.Parameter(gauss((16, 8), 1)), nn.Parameter(gauss((8, 8), 2))
    groups = [
        Group("a", Rule(Spectral()), 0.1, [(ParamInfo("a", (16, 8), Role.HIDDEN), matrix)]),
        Group("b", Baseline("lion"), 0.1, [(ParamInfo("b", (8, 8), Role.HEAD), vector)]),
    ]
    optimizer = HybridOptimizer(groups)
    before = [matrix.detach().clone(), vector.detach().clone()]
    run(optimizer, [matrix, vector], steps=2)
    assert not torch.equal(matrix, before[0])
    assert not torch.equal(vector, before[1])
    assert optimizer.state_bytes() == 4 * (16 * 8 + 8 * 8)
    assert set(optimizer.state_tensors()) == {"a.momentum", "b.exp_avg"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lyon", {}, "'lyon' is not one of .*Did you mean 'lion'"),
        ("lion", {"betas": (2.0, 0.9)}, "'lion': pytorch_optimizer.Lion refuses"),
        ("sgd", {"momentun": 0.9}, "'sgd': torch.optim.SGD refuses .*momentun"),
    ],
)
def test_bad_names_and_options_are_one_message(name, options, message):
    with pytest.raises(UsageError, match=message):
        one_group(Baseline(name, options), [gauss((4, 3), 1)], 0.1)
