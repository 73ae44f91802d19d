"""The budget of step sizes: against sums worked out by hand, in recipes, and for foreign models."""

import math

import pytest
import torch
from torch import nn

from geon.engine.build import build, make_batches, make_corpus, make_model, make_routing
from geon.engine.parallel import start
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.optim import build as build_optimizer
from geon.optim.modular import Embed, Linear, ModularNorm, Network, Series
from geon.optim.modular.budget import step_factors
from tests.distributed.jobs import TINY

GPT = [*TINY, "model=gpt", "parallel=single", "parallel.compile=false"]


def routed(*options):
    config = compose([*GPT, *options])
    model = make_model(config.model)
    return make_routing(model, config.optim), model, config


def rates(routing):
    return {info.name: routing.configs[routing.assigned[info.name]].lr for info in routing.infos}


def by_hand(layers, scaled):
    """Steps of q, k, v, output, up, down of each block, with the geometric mean taken off.

    Plain: branch number j (1, 2, ...) reads a stream of size j at its bound, and leaves one of
    j + 1; what follows multiplies by (j + 2)/(j + 1), (j + 3)/(j + 2) ..., and the last norm
    divides by the size in the end: 1/(j + 1) in all. Scaled: a share of 1/(2 layers), and
    sensitivity 1 of all that follows. q, k and v have a third of the attention's sensitivity each.
    """
    found = {}
    for i in range(layers):
        for half, names in ((0, "qkvo"), (1, "ud")):
            follows = 1 / (2 * layers) if scaled else 1 / (2 * i + half + 2)
            for name in names:
                found[i, name] = (3.0 if name in "qkv" else 1.0) / follows
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    return {key: value / mean for key, value in found.items()}


PLACES = {
    "q": "attention.proj_in.q",
    "k": "attention.proj_in.k",
    "v": "attention.proj_in.v",
    "o": "attention.proj_out",
    "u": "up",
    "d": "down",
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_factors_by_hand(layers, scaled):
    residual = "scaled" if scaled else "plain"
    model = ["optim=muon", f"model.n_layer={layers}", f"model.residual={residual}"]
    found = rates(routed(*model, "optim.budget=modular")[0])
    flat = rates(routed(*model)[0])
    for (i, name), factor in by_hand(layers, scaled).items():
        full = f"blocks.{i}.{PLACES[name]}.weight"
        assert found[full] / flat[full] == pytest.approx(factor, rel=6e-4)
    for name in ("embed.weight", "head.weight"):
        assert found[name] == flat[name]


@pytest.mark.parametrize(("residual", "change"), [("plain", 0.25), ("scaled", 1e-9)])
def test_the_mean_before_it_is_set_to_one_tends_to_a_constant(residual, change):
    """Of 1/c, in the logarithm, from 8 to 64 layers: plain ones by a third of an octave."""
    means = []
    for layers in (8, 64):
        _, model, _ = routed(f"model.n_layer={layers}", f"model.residual={residual}")
        norm = ModularNorm.of(model.modular())
        logs = [-math.log(c) for key, c in norm.coefficients.items() if key.startswith("blocks.")]
        means.append(sum(logs) / len(logs))
    assert means[0] == pytest.approx(means[1], abs=change)


@pytest.mark.parametrize(
    ("arch", "fused", "recipe"),
    [
        ("gpt", True, "hybrid"),
        ("gpt2", False, "scion"),
        ("gpt_track3", True, "muon"),
        ("gpt", False, "manifold_muon"),
        ("gpt2", True, "signsgd"),
    ],
)
def test_every_recipe_of_ours_has_a_budget_of_geometric_mean_one(arch, fused, recipe):
    told = [f"model={arch}", f"model.fused_qkv={str(fused).lower()}", f"optim={recipe}"]
    routing, model, _ = routed(*told, "optim.budget=modular")
    found, flat = rates(routing), rates(routed(*told)[0])
    logs = []
    for info in routing.infos:
        if str(info.role) == "hidden":
            count = max(1, len(info.splits))
            logs += [math.log(found[info.name] / flat[info.name])] * count
        else:
            assert found[info.name] == flat[info.name]
    assert len(logs) == 6 * model.shape.n_layer
    assert sum(logs) == pytest.approx(0.0, abs=1e-3 * len(logs))
    assert max(logs) - min(logs) > 0.5
    assert "budget: rates of" in routing.table()


def test_a_step_moves_each_matrix_by_its_rate():
    """Unit spectral norms of directions: what a step moves is the rate, matrix by matrix."""
    routing, model, config = routed(
        "optim=uscion", "optim.budget=modular", "model.residual=scaled",
        "optim.polar.steps=12", "optim.hidden.radius=1", "optim.hidden.init=model",
    )  # fmt: skip
    corpus = make_corpus(config.data, 0)
    batches = make_batches(config, corpus, 0, 1)
    run = build(config, start(config.parallel, "cpu", Env()), corpus, batches, model, routing)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.model(*batches.step(0)[0]).backward()
    run.optimizer.step()
    wanted = rates(routing)
    for name, param in run.model.named_parameters():
        if name.startswith("blocks."):
            moved = torch.linalg.svdvals((param - before[name]).detach())[0]
            scale = math.sqrt(param.shape[0] / param.shape[1])
            assert float(moved) / scale == pytest.approx(wanted[name], rel=0.05)


@pytest.mark.parametrize("recipe", ["adamw", "lion"])
def test_a_budget_without_effect_is_refused(recipe):
    with pytest.raises(UsageError, match=r"optim.budget=modular has no effect"):
        routed(f"optim={recipe}", "optim.budget=modular")
    assert routed(f"optim={recipe}", "optim.budget=flat")


def test_flat_is_what_there_was():
    plain, told = routed("optim=hybrid")[0], routed("optim=hybrid", "optim.budget=flat")[0]
    assert set(plain.rules) == {"hidden", "qk", "embedding", "head"} == set(told.rules)
    assert plain.assigned == told.assigned and not plain.note


def test_step_sizes_that_differ_beyond_use_are_refused():
    body = Series(tuple(Linear(f"w{i}", (2, 2), own_mass=10.0 ** (2 * i)) for i in range(3)))
    with pytest.raises(UsageError, match=r"'w2' would step 10,000 times as far as 'w0'"):
        step_factors(Network(Embed("t", (3, 2)), body), ["w0", "w1", "w2"])


# Foreign models.


def factors(model):
    """Rates by name of a foreign model under Muon's recipe, over that of flat."""
    found = {}
    for budget in ("flat", "modular"):
        told = build_optimizer(model, "muon", settings={"budget": budget}, verbose=False)
        for group in told.param_groups:
            for name in group["param_names"]:
                found.setdefault(name, []).append(group["lr"])
    return {name: rates[1] / rates[0] for name, rates in found.items()}


def test_llama_has_the_budget_of_its_structure():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    found = factors(transformers.LlamaForCausalLM(config))
    # As plain gpt, with gate and up of half the MLP's sensitivity each, which doubles their steps.
    hand = {}
    for i in range(2):
        for half, names in ((0, "qkvo"), (1, "gud")):
            for name in names:
                own = 3.0 if name in "qkv" else 2.0 if name in "gu" else 1.0
                hand[i, name] = own * (2 * i + half + 2)
    mean = math.exp(sum(map(math.log, hand.values())) / len(hand))
    places = {"q": "self_attn.q", "k": "self_attn.k", "v": "self_attn.v", "o": "self_attn.o",
              "g": "mlp.gate", "u": "mlp.up", "d": "mlp.down"}  # fmt: skip
    for (i, name), value in hand.items():
        full = f"model.layers.{i}.{places[name]}_proj.weight"
        assert found[full] == pytest.approx(value / mean, rel=6e-4)
    assert found["model.embed_tokens.weight"] == 1.0


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Qwen3"])
def test_other_known_decoders_have_one(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind != "GPT2":
        sizes["intermediate_size"] = 24
    if kind == "Qwen3":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    names = {"GPT2": "GPT2LMHeadModel"}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config)
    found = [value for name, value in factors(model).items() if value != 1.0]
    assert len(found) >= 7 and min(found) < 0.9 < 1.1 < max(found)


def test_unknown_models_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    with pytest.raises(UsageError, match=r"'1.weight' does in its model.*budget=flat"):
        build_optimizer(model, "muon", settings={"budget": "modular"}, verbose=False)


def test_a_model_may_describe_itself():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def modular(self):
            one, two = Linear("a.weight", (4, 4)), Linear("b.weight", (4, 4), own_mass=4.0)
            return Network(Embed("table.weight", (9, 4)), Series((one, two)))

    found = factors(Own())
    assert found["a.weight"] == pytest.approx(0.5, rel=1e-3)
    assert found["b.weight"] == pytest.approx(2.0, rel=1e-3)
