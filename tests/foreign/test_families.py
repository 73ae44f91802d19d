"""Models that others wrote: their table, and the step of each kind of weight, against an SVD."""

import copy
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from geon.optim import Role, build, classify
from tests.foreign.families import FAMILIES, HEADS, KV, NanoGPT, loss, make, table

logging.set_verbosity_error()
ROOT = Path(__file__).resolve().parents[2]
ACCURATE = {
    "polar.coefficients": "polar_express",
    "polar.accuracy": 1e-6,
    "polar.lower": 1e-7,  # squares of Gaussians have singular values of 1e-5 of their length
    "hidden.spectral_scale": "rms",
    "hidden.weight_decay": 0.0,
}


def thirds(w):
    return list(w.split(len(w) // 3))


def halves(w):
    return list(w.split(len(w) // 2))


def by_head(w, heads=HEADS, shares=(1, 1, 1)):
    """Rows of each head, or group of heads, that hold a share of q, k and v in turn."""
    parts = w.view(heads, sum(shares), -1, w.shape[1])
    return [part.reshape(-1, w.shape[1]) for part in parts.split(list(shares), dim=1)]


def each(cut, transposed=False):
    """The parts of each expert."""
    return lambda w: [part for one in w for part in cut(one.T if transposed else one)]


def alone(w):
    return [w]


STORED = {
    "Phi-3": {
        "*.qkv_proj.weight": lambda w: list(w.split([32, 16, 16])),
        "*.gate_up_proj.weight": halves,
    },
    "GPT-2": {
        "*.c_attn.weight": lambda w: thirds(w.T),
        "*.c_proj.weight": lambda w: [w.T],
        "*.c_fc.weight": lambda w: [w.T],
    },
    "nanoGPT": {"*.c_attn.weight": thirds},
    "GPT-NeoX": {"*.query_key_value.weight": by_head},
    "Bloom": {"*.query_key_value.weight": by_head},
    "Falcon": {"*.query_key_value.weight": lambda w: by_head(w, KV, (HEADS // KV, 1, 1))},
    "Falcon 7B": {"*.query_key_value.weight": lambda w: list(w.split([32, 8, 8]))},
    "Falcon RW": {"*.query_key_value.weight": by_head},
    "Mixtral": {"*.gate_up_proj": each(halves), "*.down_proj": each(alone)},
    "Qwen3-MoE": {"*.gate_up_proj": each(halves), "*.down_proj": each(alone)},
    "GPT-OSS": {
        "*.gate_up_proj": each(lambda w: [w[::2], w[1::2]], transposed=True),
        "*.down_proj": each(alone, transposed=True),
    },
    "DeepSeek-V3": {
        "*.experts.gate_up_proj": each(halves),
        "*.experts.down_proj": each(alone),
        "*.kv_a_proj_with_mqa.weight": lambda w: list(w.split([12, 4])),
        "*.kv_b_proj.weight": lambda w: by_head(w, HEADS, (4, 3)),  # 8 and 6 rows, in pairs
    },
    "ModernBERT": {"*.Wqkv.weight": thirds, "*.Wi.weight": halves},
    "ViT": {"*.projection.weight": lambda w: [w.flatten(1)]},
    "nn.TransformerEncoder": {"*.in_proj_weight": thirds},
    "nn.GRU": {"core.weight_*": thirds},
    "nn.LSTM": {"core.weight_*": lambda w: list(w.split(len(w) // 4))},
    "nn.Conv1d, nn.Conv2d": {
        "stem.weight": lambda w: [w.flatten(1)],
        "line.weight": lambda w: [w.flatten(1)],
        "grouped.weight": lambda w: halves(w.flatten(1)),
    },
}
"""How the forward pass of each family reads its weights; what is not here is one matrix."""

OTHERWISE = {
    r"(embed_tokens|embed|wpe|wte|embed_in|word_embeddings|shared|tok_embeddings)\.weight|"
    r".*(position_embeddings|token_type_embeddings|relative_attention_bias)\.weight": "embedding",
    r"(lm_head|head|classifier|fc)\.weight": "head",
    r"cls_token|position_embeddings|depthwise\.weight": "other",
}
"""Roles of weights that are not hidden, by the end of their name."""
TIED = {
    "Llama, tied",
    "Gemma2",
    "GPT-2",
    "nanoGPT",
    "Bloom",
    "Falcon",
    "Falcon 7B",
    "Falcon RW",
    "T5",
    "BERT",
    "ModernBERT",
}
"""Families whose head is the embedding of tokens."""


def role(family, name):
    """What a weight of two dimensions or more is, read off its name."""
    for pattern, found in OTHERWISE.items():
        if re.search(rf"(^|\.)({pattern})$", name):
            token = re.search(r"(wte|embed_tokens|word_embeddings|shared|tok_embeddings)\.", name)
            return "tied" if found == "embedding" and token and family in TIED else found
    return "hidden"


def cut(family, name, weight):
    """The matrices in a weight, as its family reads it."""
    for glob, read in STORED.get(family, {}).items():
        if fnmatchcase(name, glob):
            return read(weight)
    return [weight]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_parameter_has_its_role_without_a_word(family):
    model = make(family)
    infos = classify(model)
    assert [info.name for info in infos] == [name for name, _ in model.named_parameters()]
    for info in infos:
        if len(info.shape) < 2 or info.name.endswith("bias"):
            assert info.role in (Role.GAIN, Role.BIAS, Role.OTHER), info
        else:
            assert info.role == role(family, info.name), info


def errors(family, **settings):
    """How far steps of hidden weights are from those of an SVD, over the length of the step."""
    model = make(family)
    optimizer = build(model, "muon", lr=0.1, settings=settings, verbose=False)
    loss(family, model).backward()
    weights = {n: p for n, p in model.named_parameters() if p.grad is not None}
    draw = torch.Generator().manual_seed(1)
    for name, param in weights.items():  # experts that no token reached have no gradient
        assert param.grad.isfinite().all(), name
        param.grad.copy_(torch.randn(param.shape, generator=draw))
    before = {name: param.detach().double().clone() for name, param in weights.items()}
    optimizer.step()
    hidden = {info.name for info in classify(model) if info.role is Role.HIDDEN} & set(weights)
    found = {}
    for name in hidden:
        tensors = before[name], weights[name].detach().double(), weights[name].grad.double()
        for old, new, grad in zip(*(cut(family, name, t) for t in tensors), strict=True):
            u, _, vh = torch.linalg.svd(grad, full_matrices=False)
            step = -0.1 * math.sqrt(old.shape[0] / old.shape[1]) * (u @ vh)
            found[name] = max(found.get(name, 0.0), float((new - old - step).norm() / step.norm()))
    assert set(STORED.get(family, ())) <= {
        glob for glob in STORED.get(family, ()) if any(fnmatchcase(n, glob) for n in found)
    }
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_matrices_step_as_an_svd_says(family):
    found = errors(family, **ACCURATE)
    assert max(found.values()) <= 1e-5, found


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("recipe", ["hybrid", "manifold_muon"])
def test_three_steps_lower_the_loss(family, recipe):
    model = make(family)
    optimizer = build(model, recipe, lr=0.01, verbose=False)
    first = float(loss(family, model).detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss(family, model).backward()
        optimizer.step()
    assert float(loss(family, model).detach()) < first


PARTS = {
    "Phi-3": ("self_attn", "o_proj"),
    "GPT-2": ("attn", "c_proj"),
    "nanoGPT": ("attn", "c_proj"),
    "GPT-NeoX": ("attention", "dense"),
    "Bloom": ("self_attention", "dense"),
    "Falcon": ("self_attention", "dense"),
    "Falcon 7B": ("self_attention", "dense"),
    "Falcon RW": ("self_attention", "dense"),
    "ModernBERT": ("attn", "Wo"),
}


@pytest.mark.parametrize("family", list(PARTS))
def test_the_parts_of_a_fused_weight_are_the_models_own_q_k_and_v(family):
    """By the model alone: twice q and half of k are the same scores; without v nothing comes out.

    The model's biases are zeroed, and the input of the output projection is looked at.
    """
    model = make(family).eval()
    name, end = PARTS[family]
    (info, *_) = (i for i in classify(model) if len(i.splits) == 3)
    attention = next(m for n, m in model.named_modules() if n.endswith(f".{name}"))
    seen = []
    attention.get_submodule(end).register_forward_hook(lambda _, args, out: seen.append(args[0]))
    weight = model.get_parameter(info.name)
    start = copy.deepcopy(weight.detach())
    for leaf, param in model.named_parameters():
        if leaf.endswith("bias"):
            param.data.zero_()

    def output(scales):
        flat = start.reshape(info.matrix_shape).clone()
        index = 0
        for block in info.blocks():
            opened = block.view.open(flat[block.slices][None])
            parts = [one for many in opened for one in many.unbind()]
            for part in parts:
                part.mul_(scales[index])
                index += 1
            again, at = [], 0
            for many in opened:
                again.append(torch.stack(parts[at : at + len(many)]))
                at += len(many)
            flat[block.slices] = block.view.close(again, block.box)[0]
        weight.data.copy_(flat.view(info.shape))
        seen.clear()
        with torch.no_grad():
            loss(family, model)
        return seen[0]

    plain = output((1, 1, 1))
    assert float(plain.norm()) > 0.1
    assert torch.allclose(output((2, 0.5, 1)), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output((2, 1, 1)), plain, rtol=1e-4, atol=1e-5)
    assert torch.allclose(output((1, 1, 3)), 3 * plain, rtol=1e-4, atol=1e-5)
    assert not output((1, 1, 0)).any()


def test_the_table_of_the_documentation_is_what_classify_says():
    assert table() in (ROOT / "docs" / "library.md").read_text("utf-8")


def test_nano_gpt_here_is_tied_after_its_head():
    model = NanoGPT()
    assert [i.name for i in classify(model) if i.role is Role.TIED] == ["transformer.wte.weight"]
