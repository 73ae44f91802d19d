"""`build`: a recipe on a model, what it prints, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from geon.configs.check import resolve
from geon.configs.recipes import read, recipes
from geon.configs.schema import register
from geon.errors import UsageError
from geon.optim import AdamW, HybridOptimizer, Rule, build, fused
from tests.foreign.families import loss as loss_of
from tests.foreign.families import make

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ["hybrid", "muon", "manifold_muon", "normuon", "scion", "adamw"]


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 11))


def step(model, optimizer, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = scale * torch.randn(param.shape, generator=draw)
    optimizer.step()


@pytest.mark.parametrize("name", [*RECIPES, "spectral_sphere", "lion"])
def test_a_recipe_is_what_hydra_composes(name):
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = resolve(compose("train", [f"optim={name}", "optim.lr=0.037"]))
    assert read(name, 0.037) == composed.optim
    assert set(RECIPES) < set(recipes())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_one_call(name, capsys):
    model = toy()
    optimizer = build(model, name, lr=0.02)
    printed = capsys.readouterr().out
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert printed.startswith(f"optimizer: {name}\n")
    assert all(word in printed for word in ("embedding", "hidden", "head", "bias", "1.weight"))
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    hidden = next(g for g in optimizer.param_groups if g["param_names"] == ["1.weight"])
    assert hidden["lr"] == pytest.approx(0.005 if name == "hybrid" else 0.02)
    step(model, optimizer)
    build(toy(), name, verbose=False)
    assert not capsys.readouterr().out


def test_adamw_is_torchs_own_without_clipping():
    ours, theirs = toy(), toy()
    optimizer = build(ours, "adamw", lr=0.01, verbose=False)
    decayed = [theirs[1].weight, theirs[3].weight]
    rest = [p for p in theirs.parameters() if all(p is not d for d in decayed)]
    other = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    for seed in range(3):
        step(ours, optimizer, seed, scale=100.0)
        step(theirs, other, seed, scale=100.0)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


def test_settings_are_keys_of_the_recipe():
    model = toy()
    optimizer = build(
        model,
        "muon",
        settings={"hidden.weight_decay": 0.0, "rest.lr": 0.5, "max_norm": 1.0},
        verbose=False,
    )
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert groups["hidden"]["weight_decay"] == 0.0
    assert groups["rest"]["lr"] == 0.5
    assert optimizer.max_norm == 1.0
    for key, words in {
        "hidden.wieght_decay": "unknown key 'hidden.wieght_decay'.*'hidden.weight_decay'",
        "hiden": "unknown key 'hiden'",
    }.items():
        with pytest.raises(UsageError, match=words):
            build(toy(), "muon", settings={key: 0.0})
    with pytest.raises(UsageError, match="optim.hidden.momentum"):
        build(toy(), "muon", settings={"hidden.momentum": "much"})
    with pytest.raises(UsageError, match="'muno' is not one of .* Did you mean 'muon'"):
        build(toy(), "muno")
    with pytest.raises(UsageError, match="lr -1.0 must be finite and 0 or more"):
        build(toy(), "muon", lr=-1.0)


def test_overrides_change_rules_as_well_as_roles():
    model = toy()
    optimizer = build(
        model,
        "muon",
        overrides={
            "1.weight": {
                "lr": 0.5,
                "manifold": "stiefel",
                "spectral_scale": "rms",
                "weight_decay": 0.0,
            },
            "0.*": "other",
        },
        verbose=False,
    )
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert groups["1.weight"]["lr"] == 0.5
    assert groups["1.weight"]["momentum"] == 0.95  # of the rule that it changes
    assert "Stiefel" in groups["1.weight"]["rule"]
    assert "0.weight" in groups["rest"]["param_names"]
    for said, words in (
        ({"*": {"lr": 0.1}}, "matches 5 parameters of the rules embedding, head, hidden, rest"),
        ({"9.*": {"lr": 0.1}}, "matches 0 parameters"),
        ({"1.weight": {"lrr": 0.1}}, r"overrides\['1.weight'\].lrr"),
    ):
        with pytest.raises(UsageError, match=words):
            build(toy(), "muon", overrides=said)


class Unsure(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.up, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)


def test_what_is_unsure_is_refused_told_or_left_to_the_rest(capsys):
    with pytest.raises(UsageError, match=r'"qkv.weight": fused\(q=8, k=8, v=8\)'):
        build(Unsure(), "muon")
    optimizer = build(Unsure(), "muon", overrides={"qkv.weight": fused(q=8, k=8, v=8)})
    assert optimizer.plan.orthogonalized == 4
    assert "unsure" not in capsys.readouterr().out
    optimizer = build(Unsure(), "muon", fallback=True)
    assert optimizer.plan.orthogonalized == 1
    assert capsys.readouterr().out.rstrip().endswith("unsure, so stepped as the rest: qkv.weight")


def test_a_head_that_is_called_by_hand_is_asked_for(capsys):
    build(nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8)), "muon")
    assert "no head was found" in capsys.readouterr().out
    build(toy(), "muon")
    assert "no head" not in capsys.readouterr().out


def test_weights_are_brought_to_their_manifold_and_it_is_said(capsys):
    model = toy()
    optimizer = build(model, "manifold_muon")
    rule = optimizer.rules["hidden"]
    assert float(rule.manifold.residual(model[1].weight.detach())) < 1e-5
    assert "brought to their manifolds: 1 of 1 weights, by" in capsys.readouterr().out
    with pytest.raises(UsageError, match="'1.weight' is not on Stiefel"):
        build(toy(), "manifold_muon", project=False)


def test_a_loaded_model_is_not_changed_unless_told_to(tmp_path):
    make("Llama").save_pretrained(tmp_path)
    model = type(make("Llama")).from_pretrained(tmp_path)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(UsageError, match="was loaded from .*manifold_muon.*project=True"):
        build(model, "manifold_muon", verbose=False)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    build(model, "muon", verbose=False)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    build(model, "manifold_muon", project=True, verbose=False)
    assert not torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight
    )


def test_two_lines_move_a_script():
    """The README's: the import, and the optimizer in place of AdamW's."""
    script = """
import torch
from tests.foreign.families import loss, make
from geon.optim import build
model = make("GPT-NeoX")
optimizer = build(model, "hybrid", lr=0.02)
for step in range(3):
    loss("GPT-NeoX", model).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "query_key_value" in done.stdout


def test_heads_of_q_and_k_are_found_in_foreign_models():
    """The hybrid steps each head of q and k on its own, where it is known how many there are."""
    optimizer = build(make("Qwen3"), "hybrid", verbose=False)
    own = {g["name"]: g["param_names"] for g in optimizer.param_groups}
    assert {name.split(".")[-2] for name in own["qk"]} == {"q_proj", "k_proj"}
    assert "qk" not in {g["name"] for g in build(make("GPT-2"), verbose=False).param_groups}
    heads = sum(m.route == "qk" for m in optimizer.plan.matrices)
    assert heads == 2 * (4 + 2)


def test_state_dicts_of_fused_and_transposed_weights_load_into_a_compiled_model():
    model = make("GPT-OSS")
    optimizer = build(model, "normuon", verbose=False)
    loss_of("GPT-OSS", model).backward()
    optimizer.step()
    other = torch.compile(make("GPT-OSS"), backend="eager")
    again = build(other, "normuon", verbose=False)
    again.load_state_dict(optimizer.state_dict())
    for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert isinstance(again.rules["hidden"], Rule)
    assert isinstance(again.rules["rest"], AdamW)
    assert isinstance(again, HybridOptimizer)
