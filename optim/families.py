"""How models that others wrote store their weights, by module type and name. No import of them."""

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from geon.optim.declare import Declared, fused, stored
from geon.optim.place import Place, from_package
from geon.optim.roles import Role
from geon.optim.tree import classes

SINGLE = (
    r"(q|k|v|o|query|key|value|out|w[1-3qkvo]|wi_[01]|[qkv]_lin"
    r"|(q|k|v|o|g|out|query|key|value|gate|up|down)_proj)"
)
"""Names under which a Linear is one matrix, whatever its size."""
HALVED = r"w1|up_proj|gate_proj"
"""Those that hold gate and up in models of some."""

_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
_HEAD_DIM = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv")


def _heads(place: Place, rows: int) -> int:
    """Heads of so many rows; 0 if the size of a head is unknown, or does not divide them."""
    count, width = place.find(*_HEADS), place.find(*_HEAD_DIM)
    if not width and count:
        size = place.find("embed_dim", "hidden_size", "d_model", "n_embd", "dim")
        width = size // count if size % count == 0 else 0
    known = count, place.find(*_KV_HEADS)
    return rows // width if width and rows % width == 0 and rows // width in known else 0


def thirds(place: Place, interleaved: bool = False) -> Declared | None:
    """Equal q, k and v: one after the other, or head by head."""
    rows, rest = divmod(place.shape[0], 3)
    heads = _heads(place, rows)
    if rest or (interleaved and not heads):
        return None
    return fused(q=rows, k=rows, v=rows, heads=heads, interleaved=heads if interleaved else 0)


def halves(place: Place) -> Declared | None:
    """Equal gate and up, one after the other."""
    rows, rest = divmod(place.shape[0], 2)
    return None if rest else fused(gate=rows, up=rows)


def grouped(place: Place) -> Declared | None:
    """All of q, then k and v of fewer heads."""
    count, own = place.find(*_HEADS), place.find(*_KV_HEADS)
    width, rest = divmod(place.shape[0], count + 2 * own) if count and own else (0, 1)
    if rest:
        return None
    heads = (count, own, own)
    return fused(q=count * width, k=own * width, v=own * width, heads=heads)


def falcon(place: Place) -> Declared | None:
    """Falcon: q of a group, its k and its v, again and again; one k and v; or as Bloom."""
    module: Any = place.parent
    count, width = module.num_heads, module.head_dim
    own = module.num_kv_heads if module.new_decoder_architecture else 1
    if not (module.new_decoder_architecture or module.multi_query):
        return thirds(place, interleaved=True)
    q, kv = count * width, own * width
    return fused(q=q, k=kv, v=kv, heads=(count, own, own), interleaved=own if own > 1 else 0)


def bigcode(place: Place) -> Declared | None:
    """GPTBigCode: q of all heads and one k and v; otherwise q, k, v head by head."""
    module: Any = place.parent
    if not getattr(module, "multi_query", False):
        return thirds(place, interleaved=True)
    width = module.head_dim
    return fused(q=module.embed_dim, k=width, v=width, heads=(module.num_heads, 1, 1))


def adapter(place: Place) -> Declared | None:
    """LoRA of GPT-2's c_attn: its rows are q, k and v, or k and v where they meet an encoder."""
    width = place.find("embed_dim", "hidden_size")
    if width and place.shape[0] == 2 * width:
        return fused(k=width, v=width, heads=_heads(place, width))
    return thirds(place)


def latent(place: Place) -> Declared | None:
    """Multi-head latent attention: the latent with k's rotary part; or k and v of each head."""
    count, rank = place.find(*_HEADS), place.find("kv_lora_rank")
    plain, turned = place.find("qk_nope_head_dim"), place.find("qk_rope_head_dim")
    value = place.find("v_head_dim")
    down = place.child in ("kv_a_proj_with_mqa", "wkv_a")
    if down and rank and turned and place.shape[0] == rank + turned:
        return fused(latent=rank, k=turned)
    if not down and plain and value and place.shape[0] == count * (plain + value):
        return fused(k=count * plain, v=count * value, heads=count, interleaved=count)
    return None


def gated(place: Place) -> Declared | None:
    """Qwen3-Next and 3.5: each head's q, and the gate of its output."""
    count, width = place.find(*_HEADS), place.find("head_dim")
    if not width or place.shape[0] != 2 * count * width:
        return None
    size = count * width
    return fused(q=size, gate=size, heads=count, interleaved=count)


def vision(place: Place) -> Declared | None:
    """Attention of timm, of torchvision's Swin, and of transformers' vision models."""
    kv, known = place.find(*_KV_HEADS), ("timm", "torchvision", "transformers")
    equal = kv in (0, place.find(*_HEADS))
    if equal and any(from_package(place.parent, package) for package in known):
        return thirds(place)
    return None


def one_head_each(place: Place) -> Declared | None:
    """q, k, v and output of an attention: one matrix, with its heads where they are known."""
    if not _in_attention(place):
        return None
    if re.fullmatch(r"o|o_proj|out_proj|wo|Wo|out_lin|dense|c_proj", place.child):
        heads = _heads(place, place.shape[1])
        return stored(heads=heads, head_axis=1) if heads else stored()
    if re.fullmatch(r"[qkv]|[qkv]_proj|w[qkv]|query|key|value|[qkv]_lin", place.child):
        return stored(heads=_heads(place, place.shape[0]))
    return None


def _in_attention(place: Place) -> bool:
    return any("attention" in name.lower() for name in classes(place.parent))


_LINEAR: list[tuple[str, tuple[str, ...], Callable[[Place], Declared | None]]] = [
    ("query_key_value", ("FalconAttention",), falcon),
    (
        "query_key_value",
        (
            "GPTNeoXAttention",
            "BloomAttention",
            "GPTNeoXJapaneseAttention",
            "PersimmonAttention",
        ),
        lambda place: thirds(place, interleaved=True),
    ),
    ("qkv_proj", ("Phi3Attention", "Phi4MultimodalAttention"), grouped),
    ("Wqkv", ("ModernBertAttention", "ModernBertDecoderAttention", "MptAttention"), thirds),
    ("Wi", ("ModernBertMLP", "ModernBertDecoderMLP"), halves),
    ("c_attn", ("GPTBigCodeAttention",), bigcode),
    ("c_attn", ("CausalSelfAttention",), thirds),  # nanoGPT
    ("c_attn", ("GPT2Attention",), adapter),
    ("qkv", ("Attention", "WindowAttention", "ShiftedWindowAttention"), vision),
    ("dense", ("MobileBertLMPredictionHead",), lambda place: stored("head", transposed=True)),
]
"""Names of Linears, the classes that hold them, and how they are stored."""


def linear(place: Place) -> Declared | str:
    """How a Linear is stored; words for one that several matrices may share."""
    for child, owners, read in _LINEAR:
        if place.child == child and place.within(*owners) and (found := read(place)):
            return found
    if place.child in ("kv_a_proj_with_mqa", "kv_b_proj", "wkv_a", "wkv_b"):
        return latent(place) or place.fused
    known = from_package(place.parent, "transformers")
    if known and place.child == "gate_up_proj" and (found := halves(place)):
        return found
    if known and place.child == "qkv" and (found := vision(place)):
        return found
    if place.child == "q_proj" and (said := _gated_q(place)):
        return said
    if (found := one_head_each(place)) is not None:
        return found
    if re.fullmatch(SINGLE, place.child):
        return _by_size(place) or stored() if re.fullmatch(HALVED, place.child) else stored()
    return place.fused or _by_size(place) or stored()


def _gated_q(place: Place) -> Declared | str:
    """How a q_proj is stored that is twice as tall as its heads; '' for another."""
    count, width = place.find(*_HEADS), place.find("head_dim")
    if place.find("qk_nope_head_dim") or not count or place.shape[0] != 2 * count * width:
        return ""
    if place.within("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"):
        return gated(place) or ""
    return f"its {place.shape[0]} rows are twice its {count} heads of {width}"


def _by_size(place: Place) -> str:
    """Words for a Linear that is as tall as several matrices of its model together."""
    rows, cols = place.shape
    inner = place.find("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner")
    if rows == 2 * inner:
        return f"its {rows} rows are twice the {inner} of its MLP"
    if _in_attention(place) and rows == 3 * cols:
        return f"its {rows} rows in an attention are 3 times its {cols} columns"
    beside = _beside(place)
    if not any(other.in_features == rows for other in beside):
        for other in beside:
            parts, rest = divmod(rows, other.in_features)
            if other.out_features == cols and rest == 0 and parts in (2, 3):
                return f"nothing reads {rows}, but a Linear beside it reads {other.in_features}"
    return ""


def _beside(place: Place) -> list[nn.Linear]:
    """The Linears that come later in the nearest module around that has others."""
    for holder in place.parents:
        own = [m for m in holder.modules() if isinstance(m, nn.Linear)]
        if len(own) > 1:
            at = next((i for i, m in enumerate(own) if m is place.module), len(own))
            return own[at + 1 :]
    return []


def conv1d(place: Place) -> Declared | str:
    """Conv1D of transformers, stored (d_in, d_out): `c_attn` holds q, k, v, or k and v."""
    d_in, d_out = place.shape
    if place.child == "c_attn" and d_out in (2 * d_in, 3 * d_in):
        names = ("q", "k", "v")[-(d_out // d_in) :]
        sizes = dict.fromkeys(names, d_in)
        return fused(**sizes, heads=_heads(place, d_in), transposed=True)
    if place.fused:
        return place.fused
    heads = _heads(place, d_in if place.child == "c_proj" else d_out)
    if heads and _in_attention(place) and place.child in ("c_proj", "q_attn"):
        return stored(transposed=True, heads=heads, head_axis=int(place.child == "c_proj"))
    return stored(transposed=True)


def convolution(place: Place) -> Declared | str:
    """A convolution: one matrix (d_out, d_in positions) for each group of channels."""
    if place.leaf != "weight" or len(place.shape) < 3:
        return Declared(Role.OTHER) if _vector(place.shape) else "it is no kernel"
    groups: int = place.module.groups  # type: ignore[assignment]
    d_out, kernel = place.shape[0], len(place.shape) - 2
    if place.shape[1] == 1 and groups > 1:  # each channel by itself: no matrix
        return Declared(Role.OTHER)
    if place.fused:
        return place.fused
    if place.child == "pointwise_conv1" and d_out == 2 * place.shape[1]:  # of a conformer: gated
        return stored(kernel=kernel, splits=(d_out // 2,) * 2)
    splits = (d_out // groups,) * groups if groups > 1 else ()
    return stored(kernel=kernel, splits=splits)


def recurrent(place: Place) -> Declared:
    """GRU, LSTM and RNN: the gates share a weight; a projection is one matrix."""
    if place.leaf.startswith("weight_hr"):
        return stored()
    size: int = place.module.hidden_size  # type: ignore[assignment]
    gates = place.shape[0] // size
    return stored(splits=(size,) * gates if gates > 1 else ())


def attention(place: Place) -> Declared:
    """Torch's MultiheadAttention: q, k, v in one weight, or each in its own."""
    module: Any = place.module
    if place.leaf == "in_proj_weight":
        size = module.embed_dim
        return fused(q=size, k=size, v=size, heads=module.num_heads)
    if place.leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return stored(heads=module.num_heads)
    return Declared(Role.OTHER)  # bias_k, bias_v


def experts(place: Place) -> Declared | str:
    """Experts of transformers 5, which say themselves how they are stored."""
    module: Any = place.module
    transposed = getattr(module, "is_transposed", None)
    if transposed is None or len(place.shape) != 3:
        return "its module does not say whether experts are stored (d_out, d_in) or (d_in, d_out)"
    if place.leaf == "gate_up_proj":
        half = place.shape[2 if transposed else 1] // 2
        apart = 0 if module.is_concatenated else half
        return fused(gate=half, up=half, transposed=transposed, interleaved=apart)
    if place.leaf in ("up_proj", "down_proj", "gate_proj"):
        return stored(transposed=transposed)
    return "an unknown weight of experts"


def read(place: Place) -> Declared | str:
    """What a parameter of two dimensions or more is, by the type of its module.

    Returns:
        words where nothing sure can be said.
    """
    module, names = place.module, classes(place.module)
    if "bias" in place.leaf:
        return Declared(Role.BIAS)
    if place.leaf == "A_log":  # rates of a state space
        return Declared(Role.OTHER)
    if is_norm(module) and place.leaf in ("weight", "gain", "scale", "gamma"):
        return Declared(Role.GAIN)
    embeds = any("Embedding" in name for name in names) and hasattr(module, "padding_idx")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or embeds:
        return Declared(Role.EMBEDDING)
    if isinstance(module, nn.MultiheadAttention):
        return attention(place)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return recurrent(place)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return convolution(place)
    if "Conv1D" in names and len(place.shape) == 2:
        return conv1d(place)
    if hasattr(module, "is_transposed") or any("Experts" in name for name in names):
        return experts(place)
    if _vector(place.shape):
        return Declared(Role.OTHER)
    if _is_linear(place):
        return linear(place)
    if re.search(r"Router|Gate$", names[0]) and place.leaf == "weight" and len(place.shape) == 2:
        return stored()
    if place.shape[0] == 1 and re.search(r"pos|token|emb", place.leaf):
        return Declared(Role.OTHER)  # a table that is added to every sequence
    return f"no role can be read from its module type {names[0]}"


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises what passes; not a Linear that does so besides."""
    names = classes(module)[:-2]
    other = any(re.search("Linear|MLP|Conv|Attention|Block|Layer$", name) for name in names)
    torchs = isinstance(
        module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | nn.modules.batchnorm._NormBase
    )
    return torchs or (any("norm" in name.lower() for name in names) and not other)


def _is_linear(place: Place) -> bool:
    module: Any = place.module
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    named = isinstance(module, nn.Linear) or any("Linear" in name for name in classes(module))
    return place.leaf == "weight" and named and sizes == place.shape


def _vector(shape: tuple[int, ...]) -> bool:
    """Whether all entries lie along one dimension."""
    return max(shape) == math.prod(shape)
