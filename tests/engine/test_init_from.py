"""model.init_from: the function of a folder goes on being trained, whatever the options."""

import json
import shutil

import pytest
import torch

from geon.configs.recipes import read
from geon.engine import build
from geon.engine.export import export
from geon.engine.pretrained import Pretrained
from geon.engine.saved import Saved
from geon.errors import UsageError
from geon.models import MODELS, ModelShape
from geon.optim.groups import residual
from tests.distributed.jobs import EXACT, STIEFEL, distance, metrics, train, weights

pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each architecture, and its exported folder."""
    home, found = tmp_path_factory.mktemp("hf"), {}
    for arch, softcap in (("gpt", 9.0), ("gpt2", 0.0)):
        torch.manual_seed(5)
        model = MODELS[arch](ModelShape(64, 64, 2, 2, 32, softcap=softcap)).eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                centre = 1.0 if param.ndim == 1 and not name.endswith("bias") else 0.0
                param.copy_(centre + 0.2 * torch.randn_like(param))
        export(Saved(home, {"step": 1}, model, None), home / arch)
        found[arch] = model, home / arch
    return found


def begun(arch, folder, recipe="adamw", **options):
    """A model that begins with the weights of a folder, and how far they were moved."""
    with torch.device("meta"):
        model = MODELS[arch](ModelShape(64, 64, 2, 2, 32, **options))
    start = Pretrained(str(folder), model)
    model.to_empty(device="cpu")
    routing = build.make_routing(model, read(recipe))
    return model.eval(), routing, build.initialise(model, routing, 0, start)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("gpt", {}),
        ("gpt", {"gains": True, "activation_scale": 2.0, "mup": True, "base_width": 8}),
        ("gpt", {"fused_qkv": True, "gains": True}),
        ("gpt2", {}),
        ("gpt2", {"fused_qkv": True, "mup": True, "base_width": 8}),
    ],
)
def test_a_run_begins_with_the_folders_function(arch, options, folders):
    old, folder = folders[arch]
    model, _, moved = begun(arch, folder, softcap=old.shape.softcap, **options)
    ids = torch.randint(64, (2, 64))
    torch.testing.assert_close(model(ids), old(ids), atol=3e-5, rtol=1e-4)
    assert not moved


@torch.no_grad()
def test_weights_are_brought_to_the_manifolds_of_their_rules(folders):
    old, folder = folders["gpt"]
    model, routing, moved = begun("gpt", folder, "manifold_muon", softcap=9.0)
    before = dict(old.named_parameters())
    assert moved
    for info in routing.infos:
        weight, given = model.get_parameter(info.name), before[info.name]
        if info.name not in moved:
            assert torch.equal(weight, given)
            continue
        assert moved[info.name] == pytest.approx(float((weight - given).norm() / given.norm()))
        assert residual(info, weight, routing.rule(info), routing.per_head(info)) < 1e-4


def changed(folder, target, **fields):
    """A copy of a folder with other fields in its config."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


def test_what_does_not_fit_is_refused_by_its_key(folders, tmp_path):
    gpt, gpt2 = folders["gpt"][1], folders["gpt2"][1]
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = changed(gpt, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((gpt / "model.safetensors").read_bytes()[:5000])
    bare = changed(gpt, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    lost = changed(gpt, tmp_path / "lost")
    kept = load_file(gpt / "model.safetensors")
    odd = {**kept, "lm_head.weight": torch.zeros(64, 16)}
    del kept["model.layers.1.mlp.fc1.weight"]
    save_file(kept, lost / "model.safetensors")
    save_file(odd, changed(gpt, tmp_path / "odd") / "model.safetensors")
    for arch, folder, options, said in (
        ("gpt", tmp_path / "none", {}, "no such folder"),
        ("gpt", empty, {}, "holds no config.json"),
        ("gpt", gpt2, {}, "of type gpt2, and model=gpt takes nanochat"),
        ("gpt", gpt, {}, "final_logit_softcapping is 9.0, and .* None: set model.softcap"),
        ("gpt", gpt, {"softcap": 9.0, "mlp_ratio": 2}, "set model.mlp_ratio"),
        ("gpt", gpt, {"softcap": 9.0, "rope_base": 500.0}, "set model.rope_base"),
        ("gpt", gpt, {"softcap": 9.0, "tied": True}, "model.tied=true"),
        ("gpt", changed(gpt, tmp_path / "act", hidden_act="gelu"), {"softcap": 9.0}, "hidden_act"),
        ("gpt", cut, {"softcap": 9.0}, "model.safetensors cannot be read"),
        ("gpt", bare, {"softcap": 9.0}, "holds no model.safetensors"),
        ("gpt", lost, {"softcap": 9.0}, "hold no 'model.layers.1.mlp.fc1.weight'"),
        ("gpt", tmp_path / "odd", {"softcap": 9.0}, r"'head.weight' is \(64, 16\)"),
        ("gpt2", changed(gpt2, tmp_path / "long", n_positions=128), {}, "set model.context"),
        ("gpt_track3", gpt, {}, "model.arch=gpt_track3"),
    ):
        with pytest.raises(UsageError, match=f"model.init_from '.*{said}") as caught:
            begun(arch, folder, **options)
        assert "\n" not in str(caught.value)


def test_weights_in_several_files_and_without_prefix_are_read(folders, tmp_path):
    old, folder = folders["gpt2"]
    parts = changed(folder, tmp_path / "parts")
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    index = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        short, file = name.removeprefix("transformer."), f"part-{i % 2}.safetensors"
        index[short] = file
        had = load_file(parts / file) if (parts / file).exists() else {}
        save_file(had | {short: tensor}, parts / file)
    text = json.dumps({"weight_map": index})
    (parts / "model.safetensors.index.json").write_text(text)
    model, _, _ = begun("gpt2", parts)
    for name, param in model.named_parameters():
        assert torch.equal(param, old.get_parameter(name))


def trained(folders, output, name, ranks, *options):
    """A run of two steps from the folder of a gpt."""
    begin = [f"model.init_from={folders['gpt'][1]}", "model.softcap=9", "eval.every=1"]
    return train(output, name, ranks, *begin, "schedule.steps=2", EXACT[0], *options)


@pytest.mark.dist
def test_a_tensor_parallel_run_goes_on_as_one_process_does(folders, tmp_path):
    """Its first step is small, so its loss is still that of the folder."""
    alone = trained(folders, tmp_path, "alone", 1, "optim=adamw", "optim.lr=1e-9")
    cut = trained(folders, tmp_path, "tp", 2, "optim=adamw", "optim.lr=1e-9", "parallel=tp")
    assert distance(weights(alone), weights(cut)) < 1e-5
    old = dict(folders["gpt"][0].named_parameters())
    assert distance(old, weights(alone)) < 1e-5


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_layouts_train_alike_from_a_folder_and_resume_without_it(layout, folders, tmp_path):
    alone = trained(folders, tmp_path, "alone", 1, *STIEFEL)
    cut = trained(folders, tmp_path, "cut", 2, *STIEFEL, f"parallel={layout}", "shard.wire=fp32")
    assert distance(weights(alone), weights(cut)) < 1e-3
    losses = [[row["val_nats_per_token"] for row in metrics(run, "eval")] for run in (alone, cut)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = folders["gpt"][1].rename(tmp_path / "moved")
    try:
        trained(folders, tmp_path, "cut", 2, *STIEFEL, f"parallel={layout}", "schedule.steps=3")
    finally:
        moved.rename(folders["gpt"][1])
