"""What an optimizer step tells about its directions."""

import math

import pytest
import torch
from torch import nn

from geon.optim import Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from geon.optim.solvers import lgm


@pytest.fixture
def optimizer():
    """Three weights of one shape on the Stiefel manifold of radius 2."""
    manifold, params = Stiefel(radius=2.0), []
    for i in range(3):
        weight = manifold.random_point((48, 16), torch.Generator().manual_seed(i))
        param = nn.Parameter(weight)
        param.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(10 + i))
        params.append((ParamInfo(f"w{i}", (48, 16), Role.HIDDEN), param))
    return HybridOptimizer([Group("hidden", Rule(Spectral(), manifold), 0.02, params)])


def test_nothing_is_looked_at_unless_asked(optimizer):
    optimizer.step()
    assert optimizer.readings.summary() == {}
    assert optimizer.readings.fallbacks() == 0


def test_one_step_is_looked_at(optimizer):
    optimizer.readings.wanted = True
    optimizer.step()
    found = optimizer.readings.summary()
    assert 0 <= found["gap_median"] <= found["gap_max"] < 0.03
    assert found["tangency_max"] < 1e-5
    assert found["norm_max"] == pytest.approx(math.sqrt(1 + lgm.JITTER), rel=1e-4)
    assert found["residual_max"] < 1e-5
    assert found["spectrum_min"] == pytest.approx(2.0, rel=1e-5)
    assert found["spectrum_max"] == pytest.approx(2.0, rel=1e-5)
    optimizer.step()
    assert optimizer.readings.summary() == found


def test_fallbacks_are_counted_until_read(optimizer, monkeypatch):
    monkeypatch.setattr(lgm, "ENERGY", 0.0)
    optimizer.step()
    optimizer.step()
    assert optimizer.readings.fallbacks() == 6
    assert optimizer.readings.fallbacks() == 0


def test_a_broken_weight_is_logged_and_does_not_raise(optimizer):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][1][0, 0] = math.nan
    optimizer.readings.wanted = True
    optimizer.step()
    found = optimizer.readings.summary()
    assert math.isnan(found["gap_max"])
    assert math.isnan(found["spectrum_max"])
