"""Adam with a second moment a row, beside torch's Adam and a loop in fp64."""

import copy

import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import Group, HybridOptimizer, ParamInfo, Role, RowAdam, Spectral
from geon.optim.norms import ColNorm, RowNorm


def optimizer(weight, rule, lr=0.1):
    info = ParamInfo("head.weight", tuple(weight.shape), Role.HEAD)
    return HybridOptimizer([Group("head", rule, lr, [(info, weight)])])


def gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 2, shape[0]).unsqueeze(1)
    return [sizes * torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("norm", [RowNorm(), ColNorm()])
def test_it_is_the_formula_in_fp64(norm):
    weight = nn.Parameter(torch.randn(7, 5))
    rule = RowAdam(norm, radius=3.0, betas=(0.8, 0.9), decay=0.5)
    steps, made = gradients(weight.shape, 6), optimizer(weight, rule)
    w = weight.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros(7, 1, dtype=torch.float64)
    full = 5**0.5 if isinstance(norm, ColNorm) else 5**-0.5
    for t, grad in enumerate(steps, 1):
        weight.grad = grad.clone()
        made.step()
        g = grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g.square().sum(1, keepdim=True)
        w = w * (1 - 0.1 * 0.5) - 0.1 * 3.0 * full * m / (v / (1 - 0.9**t)).sqrt()
    assert torch.allclose(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_on_rows_of_one_entry_it_is_torchs_adam_but_for_the_first_averages_bias():
    weight = nn.Parameter(torch.randn(9, 1))
    peer = nn.Parameter(weight.detach().clone())
    made = optimizer(weight, RowAdam(betas=(0.0, 0.95)), lr=0.01)
    other = torch.optim.Adam([peer], lr=0.01, betas=(0.0, 0.95), eps=1e-12)
    for grad in gradients(weight.shape, 8):
        weight.grad, peer.grad = grad.clone(), grad.clone()
        made.step()
        other.step()
    assert torch.allclose(weight, peer, rtol=1e-5, atol=1e-7)


def test_a_row_that_agrees_steps_in_full_and_noise_by_less():
    weight = nn.Parameter(torch.zeros(2, 64))
    made = optimizer(weight, RowAdam(), lr=1.0)
    generator, same = torch.Generator().manual_seed(1), torch.randn(64)
    for _ in range(200):
        before = weight.detach().clone()
        weight.grad = torch.stack([same, 1e3 * torch.randn(64, generator=generator)])
        made.step()
    agreed, noise = ((weight.detach() - before).norm(dim=1) * 8).tolist()  # of 1/sqrt(64)
    assert agreed == pytest.approx(1.0, rel=1e-3)
    assert noise == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.25)  # of a mean kept at 0.9


def test_a_row_without_a_gradient_stays_and_no_number_is_lost():
    weight = nn.Parameter(torch.ones(3, 4))
    made = optimizer(weight, RowAdam())
    weight.grad = torch.tensor([[0.0] * 4, [1e-18] * 4, [1e15] * 4])
    made.step()
    assert torch.equal(weight[0], torch.ones(4))
    assert torch.isfinite(weight).all()
    assert float(weight.detach()[2, 0]) < 1.0


def test_state_is_a_momentum_and_a_number_a_row_and_goes_through_a_state_dict():
    weight, steps = nn.Parameter(torch.randn(6, 4)), gradients((6, 4), 6)
    made = optimizer(weight, RowAdam())
    for grad in steps[:3]:
        weight.grad = grad
        made.step()
    state = made.state[weight]
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "exp_avg": (6, 4),
        "row_exp_avg_sq": (6, 1),
    }
    twin = nn.Parameter(weight.detach().clone())
    again = optimizer(twin, RowAdam())
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for grad in steps[3:]:
        weight.grad, twin.grad = grad.clone(), grad.clone()
        made.step()
        again.step()
    assert torch.equal(weight, twin)


def test_vectors_other_norms_and_bad_numbers_are_refused():
    with pytest.raises(UsageError, match="rownorm or colnorm, not Spectral"):
        RowAdam(Spectral())
    with pytest.raises(UsageError, match="betas"):
        RowAdam(betas=(0.9, 1.0))
    vector = nn.Parameter(torch.zeros(4))
    info = ParamInfo("gain", (4,), Role.GAIN)
    with pytest.raises(UsageError, match="'gain' is of shape .4,.: step it by AdamW"):
        HybridOptimizer([Group("gains", RowAdam(), 0.1, [(info, vector)])])
