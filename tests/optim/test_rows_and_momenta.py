"""Rows of one length, second moments on the ball, and momenta that rest in bf16."""

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.finishes import Move
from geon.optim.manifolds import Euclidean, SpectralBall
from geon.optim.norms import Sign
from tests.optim.test_rules_against_references import gauss


@pytest.mark.parametrize("nesterov", [False, True])
def test_bf16_momenta_rest_in_two_bytes_and_average_in_fp32(nesterov):
    infos = [ParamInfo("w", (32, 16), Role.HIDDEN)]
    params, optimizers = [], []
    for dtype in (torch.float32, torch.bfloat16):
        param = nn.Parameter(gauss((32, 16), 1))
        rule = Rule(Spectral(), momentum=0.9, nesterov=nesterov)
        group = Group("g", rule, 0.02, [(infos[0], param)])
        optimizers.append(HybridOptimizer([group], momentum=dtype))
        params.append(param)
    counted = 8  # bytes of the number of roundings
    assert [o.state_bytes() for o in optimizers] == [4 * 512, 2 * 512 + counted]
    start = params[0].detach().clone()
    exact = torch.zeros(32, 16, dtype=torch.float64)
    for step in range(20):
        grad = gauss((32, 16), 100 + step)
        exact = 0.9 * exact + 0.1 * grad.double()
        for optimizer, param in zip(optimizers, params, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    held = optimizers[1].state[params[1]]["momentum"]
    assert held.dtype is torch.bfloat16
    # A rounding of 2^-8 a step at most, of which 0.9 is kept: independent ones add up to 2^-8 times
    # the root of 1 / (1 - 0.81), and to 2^-8 / (1 - 0.9) if they all went one way.
    assert (held - exact).norm() / exact.norm() < 0.02
    moved = (params[0].detach() - start).norm()
    assert 0 < (params[0] - params[1]).norm() / moved < 0.02


def test_rows_are_even_on_the_ball_as_they_are_without_it():
    """Far inside the ball the step is NorMuon's; at its surface the weight stays in it."""
    free, inside = (
        Rule(Spectral(), manifold, momentum=0.9, radius=1.0, second_moment=0.9)
        for manifold in (Euclidean(), SpectralBall(radius=100.0))
    )
    tight = Rule(Spectral(), SpectralBall(radius=0.5), momentum=0.9, second_moment=0.9)
    found = []
    for rule, lr in ((free, 0.1), (inside, 0.001), (tight, 0.2)):
        start = 0.1 * gauss((16, 8), 1)
        param = nn.Parameter(start.clone())
        group = Group("g", rule, lr, [(ParamInfo("w", (16, 8), Role.HIDDEN), param)])
        optimizer = HybridOptimizer([group])
        for step in range(5):
            param.grad = gauss((16, 8), step + 2)
            optimizer.step()
        found.append(param.detach())
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert float(tight.manifold.residual(found[2])) <= 1e-5
    assert not torch.allclose(found[0], found[2], atol=1e-2)


@pytest.mark.parametrize("shape", [(16, 8), (8, 16), (3, 16, 8)])
def test_even_rows_have_one_length_and_keep_the_size(shape):
    (finish,) = Rule(Spectral(), even_rows=True).finishes
    direction = gauss(shape, 1)
    direction[..., 2, :] = 0
    level = finish.direct(direction, None, Move(0.1, 1.0, 0.0, shape[-2:], 1.0))
    lengths = level.norm(dim=-1)
    others = [i for i in range(shape[-2]) if i != 2]
    assert torch.equal(level[..., 2, :], torch.zeros_like(level[..., 2, :]))
    wanted = direction.square().sum((-2, -1)).div(shape[-2]).sqrt()
    assert torch.allclose(lengths[..., others], wanted[..., None].expand_as(lengths[..., others]))
    cosines = (level * direction).sum(-1) / (lengths * direction.norm(dim=-1))
    assert torch.allclose(cosines[..., others], torch.ones_like(cosines[..., others]))


def test_even_rows_are_a_second_moment_that_keeps_nothing():
    found = []
    for options in ({"even_rows": True}, {"second_moment": 1e-7}):
        param = nn.Parameter(gauss((16, 8), 1))
        rule = Rule(Spectral(), momentum=0.9, **options)
        optimizer = HybridOptimizer(
            [Group("g", rule, 0.1, [(ParamInfo("w", (16, 8), Role.HIDDEN), param)])]
        )
        for step in range(4):
            param.grad = gauss((16, 8), step + 2)
            optimizer.step()
        found.append((param.detach(), optimizer.state_bytes()))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert [size for _, size in found] == [4 * 128, 4 * 128 + 4 * 16]


@pytest.mark.parametrize("options", [{"manifold": Stiefel()}, {"norm": Sign()}])
def test_even_rows_are_refused_where_directions_are_not_polar_factors(options):
    with pytest.raises(UsageError, match="even_rows gives the rows of a polar factor one length"):
        Rule(**{"norm": Spectral(), "even_rows": True, **options})


def test_even_rows_are_refused_beside_second_moments():
    with pytest.raises(UsageError, match="even_rows and second_moment both set the lengths of row"):
        Rule(Spectral(), even_rows=True, second_moment=0.9)
