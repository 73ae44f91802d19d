"""Architectures as transformers stores them: gpt is NanoChat, gpt2 is GPT-2. Both ways.

q, k and v are three weights here, whether a model of ours fuses them or not.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.models.base import LanguageModel, ModelShape

CLASSES = {"gpt": "NanoChatForCausalLM", "gpt2": "GPT2LMHeadModel"}
"""Class of transformers by our architecture."""

_OUTSIDE = {
    "gpt": {"embed": "model.embed_tokens", "head": "lm_head"},
    "gpt2": {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
    },
}
_BLOCKS = {"gpt": "model.layers", "gpt2": "transformer.h"}
_INSIDE = {
    "gpt": {
        "attention.proj_in.q": "self_attn.q_proj",
        "attention.proj_in.k": "self_attn.k_proj",
        "attention.proj_in.v": "self_attn.v_proj",
        "attention.proj_out": "self_attn.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "gpt2": {
        "norm1": "ln_1",
        "proj_in.q": "attn.c_attn",  # and k and v, side by side
        "proj_in.k": "attn.c_attn",
        "proj_in.v": "attn.c_attn",
        "proj_out": "attn.c_proj",
        "norm2": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = re.compile(r"(.*\bproj_in\.)qkv(\..*)")


def config(arch: str, shape: ModelShape) -> dict[str, Any]:
    """Fields of the config of transformers for a model of ours, without ids of special tokens.

    Raises:
        UsageError: names the key of what transformers' architecture has not.
    """
    if arch not in CLASSES:
        raise UsageError(
            f"model.arch={arch}: transformers has no such architecture (it has model=gpt, as "
            "NanoChat, and model=gpt2)"
        )
    if arch == "gpt2":
        if shape.softcap:
            raise UsageError(
                f"model.softcap={shape.softcap}: GPT-2 of transformers has none; choose model=gpt"
            )
        return {
            "vocab_size": shape.vocab_size,
            "n_positions": shape.context,
            "n_embd": shape.d_model,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_inner": shape.mlp_ratio * shape.d_model,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
        }
    for word, default in (("norm", "rms"), ("residual", "plain")):
        if (value := getattr(shape, word)) != default:
            raise UsageError(
                f"model.{word}={value}: NanoChat of transformers has model.{word}={default} alone"
            )
    if shape.tied:
        raise UsageError(
            "model.tied=true: NanoChat of transformers normalises what the embedding gives, and a "
            "tied gpt does not; it goes with model.tied=false alone"
        )
    return {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.context,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_ratio * shape.d_model,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head,
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": shape.softcap or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


_KEYS = {
    **{"vocab_size": "vocab_size", "n_positions": "context", "n_embd": "d_model"},
    **{"hidden_size": "d_model", "intermediate_size": "mlp_ratio", "n_inner": "mlp_ratio"},
    **{"n_layer": "n_layer", "num_hidden_layers": "n_layer", "n_head": "n_head"},
    **{"num_attention_heads": "n_head", "num_key_value_heads": "n_head"},
    **{"final_logit_softcapping": "softcap", "rope_parameters": "rope_base"},
}
"""Our key behind each field that has one."""


def check_config(arch: str, shape: ModelShape, given: Any) -> None:
    """Refuse a config of transformers that is of another model than ours.

    given: has its fields as attributes.

    Raises:
        UsageError: names the field, both values, and our key.
    """
    for field, ours in config(arch, shape).items():
        theirs = getattr(given, field, None)
        if field == "max_position_embeddings":  # rotary positions have no weights
            continue
        if field == "n_inner" and theirs is None:
            theirs = 4 * given.n_embd
        if field == "rope_parameters":
            theirs = {key: (theirs or {}).get(key) for key in ours}
        if theirs != ours:
            key = _KEYS.get(field)
            mend = f"set model.{key} to what it is there" if key else f"model={arch} has no other"
            raise UsageError(f"its {field} is {theirs}, and this run's is {ours}: {mend}")


def exported(model: LanguageModel) -> dict[str, Tensor]:
    """Weights of a folded model by the names of transformers."""
    found: dict[str, Tensor] = {}
    joined: dict[str, list[Tensor]] = {}
    for name, weight in _unfused(model).items():
        theirs, beside = _place(model.arch, name)
        weight = weight.mT if _is_transposed(theirs) else weight
        if beside is None:
            found[theirs] = weight.contiguous()
        else:
            joined.setdefault(theirs, []).append(weight)
    return found | {name: torch.cat(parts, -1) for name, parts in joined.items()}


def _unfused(model: LanguageModel) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        if fused := _FUSED.fullmatch(name):
            before, behind = fused.groups()
            parts = param.detach().chunk(3)
            found |= {f"{before}{x}{behind}": w for x, w in zip("qkv", parts, strict=True)}
        else:
            found[name] = param.detach()
    return found


def imported(arch: str, name: str, get: Callable[[str], Tensor]) -> Tensor:
    """A weight of ours from those of transformers.

    name: of our parameter. get: gives a weight by the name of transformers.
    """
    if fused := _FUSED.fullmatch(name):
        before, behind = fused.groups()
        return torch.cat([imported(arch, f"{before}{part}{behind}", get) for part in "qkv"])
    theirs, beside = _place(arch, name)
    weight = get(theirs)
    if beside is not None:
        weight = weight.chunk(3, -1)[beside]
    return weight.mT if _is_transposed(theirs) else weight


def _place(arch: str, name: str) -> tuple[str, int | None]:
    """Name in transformers, and which third of it where q, k and v lie side by side there."""
    if inside := _BLOCK.fullmatch(name):
        block, stem, leaf = inside.groups()
        theirs = f"{_BLOCKS[arch]}.{block}.{_INSIDE[arch][stem]}.{leaf}"
        return theirs, "qkv".index(stem[-1]) if ".c_attn." in theirs else None
    stem, leaf = name.rsplit(".", 1)
    return f"{_OUTSIDE[arch][stem]}.{leaf}", None


def _is_transposed(theirs: str) -> bool:
    """Whether it is the weight of a Conv1D, which is stored (d_in, d_out)."""
    return ".c_" in theirs and theirs.endswith(".weight")
