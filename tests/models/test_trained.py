"""llama and moe under every recipe: the loss falls, weights move and stay finite."""

import pytest
import torch

from geon.configs.choices import Arch
from geon.configs.overrides import groups
from geon.configs.recipes import read
from geon.configs.schema import ModelConfig
from geon.engine.build import initialise, make_model, make_routing
from geon.optim import HybridOptimizer, Role

SIZES = {"vocab_size": 32, "context": 16, "n_layer": 1, "n_head": 4, "d_model": 32}
OPTIONS = {
    "llama": {"n_kv_head": 2, "d_ff": 48, "qk_norm": True},
    "moe": {"n_kv_head": 2, "d_ff": 32, "n_expert": 4, "balance": 0.01},
}


@pytest.mark.parametrize("arch", sorted(OPTIONS))
@pytest.mark.parametrize("recipe", [name for name in groups()["optim"] if name != "sophia"])
def test_every_recipe_trains_it(recipe, arch):
    """Sophia apart, whose curvature the trainer measures (tests/engine/test_baselines.py)."""
    settings = read(recipe)
    routes = [rule for rule in vars(settings).values() if hasattr(rule, "baseline")]
    if any(rule.baseline for rule in routes):
        pytest.importorskip("pytorch_optimizer")
    model = make_model(ModelConfig(Arch[arch], **SIZES, options=OPTIONS[arch]))
    routing = make_routing(model, settings)
    model.to_empty(device="cpu")
    initialise(model, routing, 0)
    params = dict(model.named_parameters())
    optimizer = HybridOptimizer(routing.groups(params))
    before = {name: p.detach().clone() for name, p in params.items()}
    tokens = torch.randint(0, 32, (8, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(6):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert min(losses[1:]) < losses[0]
    for name, param in params.items():
        assert param.isfinite().all(), name
        assert not torch.equal(param, before[name]), name


def test_experts_are_stepped_as_matrices_and_the_router_by_entries():
    model = make_model(ModelConfig(Arch["moe"], **SIZES, options=OPTIONS["moe"]))
    routing = make_routing(model, read("muon"))
    infos = {info.name: info for info in model.infos}
    gate, router = infos["blocks.0.experts.gate"], infos["blocks.0.router.weight"]
    assert gate.shape == (4, 32, 32) and len(gate.blocks()) == 4
    assert routing.assigned[gate.name] == "hidden" and routing.assigned[router.name] == "rest"
    assert router.role is Role.OTHER
