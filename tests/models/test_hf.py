"""Exported folders beside transformers' own code, and what is folded into their weights."""

import dataclasses

import pytest
import torch

from geon.data import ByteCodec
from geon.engine.export import export
from geon.engine.saved import Saved
from geon.errors import UsageError
from geon.models import MODELS, hf
from geon.models.fold import folded

transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

CASES = {
    "gpt": {},
    "gpt fused, softcap": {"fused_qkv": True, "softcap": 15.0, "rope_base": 500.0},
    "gpt gains, scale, mup": {
        "gains": True,
        "activation_scale": 2.0,
        "mup": True,
        "base_width": 8,
        "fused_qkv": True,
    },
    "gpt2": {},
    "llama": {},
    "llama grouped, tied, mup": {"n_kv_head": 2, "tied": True, "mup": True, "base_width": 8},
    "llama as qwen3": {"n_kv_head": 2, "qk_norm": True, "d_head": 16, "norm_eps": 1e-6},
    "llama stretched": {"rope_scaling": "llama3", "rope_original": 16, "rope_base": 100.0},
    "moe": {"n_kv_head": 2, "n_expert": 4},
    "gpt2 fused, mup": {"fused_qkv": True, "mup": True, "base_width": 8},
}


def made(arch, **options):
    """A model with every weight drawn, gains and biases too."""
    torch.manual_seed(3)
    model = MODELS[arch](MODELS[arch].shape_type(260, 24, 2, 4, 32, **options))
    with torch.no_grad():
        for name, param in model.named_parameters():
            centre = 1.0 if param.ndim == 1 and not name.endswith("bias") else 0.0
            param.copy_(centre + 0.3 * torch.randn_like(param))
    return model.eval()


def saved(model, tmp_path, codec=None):
    return Saved(tmp_path / "run/checkpoints/step-0000007", {"step": 7}, model, codec)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_our_logits(case, tmp_path):
    model = made(case.split()[0], **CASES[case])
    export(saved(model, tmp_path), tmp_path / "out")
    other, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(other).__name__ == hf.map_of(model).kind(model.shape)[0]
    assert not said["missing_keys"] and not said["unexpected_keys"]
    ids = torch.randint(260, (2, 24))
    assert (other.eval()(ids).logits - model(ids)).abs().max() < 1e-4
    for name, param in model.named_parameters():  # and back: what init_from reads
        if model.shape == folded(model).shape:
            weights = load_file(tmp_path / "out/model.safetensors")
            assert torch.equal(hf.imported(model, name, weights.__getitem__), param)


@pytest.mark.parametrize(
    ("arch", "options", "key"),
    [
        ("gpt", {"tied": True}, "model.tied=true"),
        ("gpt2", {"softcap": 15.0}, "model.softcap=15"),
        ("gpt", {"norm": "none"}, "model.norm=none"),
        ("gpt", {"residual": "scaled"}, "model.residual=scaled"),
        ("gpt_track3", {}, "model.arch=gpt_track3"),
        ("llama", {"softcap": 15.0}, "model.softcap=15"),
        ("moe", {"qk_norm": True}, "model.options.qk_norm=true"),
    ],
)
def test_what_transformers_has_not_is_refused(arch, options, key, tmp_path):
    with pytest.raises(UsageError, match=key):
        export(saved(made(arch, **options), tmp_path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("arch", sorted(MODELS))
@pytest.mark.parametrize("tied", [False, True])
def test_folding_changes_no_logit(arch, tied):
    own = {"gains": True, "activation_scale": 3.0} if arch == "gpt" else {}
    own |= {"tied": tied} if "tied" in MODELS[arch].shape_type.defaults() else {}
    model = made(arch, mup=True, base_width=8, softcap=5.0, **own)
    ids = torch.randint(260, (2, 24))
    plain = folded(model)
    left = dataclasses.asdict(plain.shape)
    assert not left.get("gains") and left.get("activation_scale", 1.0) == 1.0
    assert left["mup"] == (arch == "gpt" and tied)
    torch.testing.assert_close(plain(ids), model(ids), atol=2e-5, rtol=1e-4)
    assert folded(plain) is plain


def test_logits_that_differ_are_not_exported(tmp_path, monkeypatch):
    model = made("gpt")
    right = hf.exported
    monkeypatch.setattr(hf, "exported", lambda m: {k: 1.01 * v for k, v in right(m).items()})
    with pytest.raises(UsageError, match="nothing was written"):
        export(saved(model, tmp_path), tmp_path / "out")
    assert not list(tmp_path.iterdir())


TEXT = "caf\u00e9 \u0100 \U0001f600\tdef f(x):\n\n  return 0\0 <|endoftext|> it's 1234"


def codecs():
    from geon.data.bpe import train_on

    return {
        "bytes": ByteCodec(),
        "bpe": train_on(iter([TEXT * 20]), 300),
        "bpe with an end": train_on(iter([TEXT * 20]), 300, ["<|endoftext|>"]),
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bpe with an end"])
def test_the_exported_tokenizer_gives_the_runs_ids_and_text_back(kind, tmp_path):
    pytest.importorskip("tokenizers")
    codec = codecs()[kind]
    text = TEXT.replace("<|endoftext|>", "")  # transformers reads that name as the token
    export(saved(made("gpt"), tmp_path, codec), tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.is_fast
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert ids == codec.encode(text).tolist()
    assert loaded.decode(ids) == text
    assert loaded.eos_token_id == (codec.eot if kind != "bytes" else None)
    assert (tmp_path / "out/README.md").read_text().startswith("---\nlibrary_name: transformers")
