"""How models that others wrote store their weights, by module type and name. No import of them."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from geon.optim.declare import Declared, fused, stored
from geon.optim.roles import Role

SINGLE = re.compile(
    r"(q|k|v|o|query|key|value|out|w[1-3qkvo]|wi_[01]|[qkv]_lin"
    r"|(q|k|v|o|g|out|query|key|value|gate|up|down)_proj)"
)
"""Names under which a Linear is one matrix, whatever its size."""
FUSED = re.compile(
    r"(?i)qkv|query_key|key_value|c_attn|in_proj|gate_up|up_gate|kv_proj|to_kv|w13|fused"
)
"""Marks in a name of a Linear that several matrices may share."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is: what its layout can be read from.

    Attributes:
        leaf: name in its module.
        shape: of the whole parameter.
        module: that holds it.
        child: name of that module in its parent, wrappers left out.
        parents: of the module, the nearest first; wrappers left out.
    """

    leaf: str
    shape: tuple[int, ...]
    module: nn.Module
    child: str
    parents: tuple[nn.Module, ...]

    @property
    def parent(self) -> nn.Module:
        """The module that holds this one; itself at the root."""
        return self.parents[0] if self.parents else self.module

    def find(self, *names: str) -> int:
        """The first of these numbers in the module, its parents and their configs; 0 for none."""
        for holder in (self.module, *self.parents):
            for source in (holder, getattr(holder, "config", None)):
                for name in names:
                    value = getattr(source, name, None)
                    if isinstance(value, int) and value > 0:
                        return int(value)
        return 0

    def within(self, *names: str) -> bool:
        """Whether the parent is of a class, or derived from one, whose name ends so."""
        return any(name.endswith(names) for name in classes(self.parent))


def classes(module: nn.Module) -> list[str]:
    """Names of a module's class and its bases: fully_shard derives one of its own."""
    return [kind.__name__ for kind in type(module).__mro__]


def from_package(module: nn.Module, package: str) -> bool:
    """Whether a module's class, or one that it derives from, is of a package."""
    return any(kind.__module__.split(".")[0] == package for kind in type(module).__mro__)


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
    if place.child == "kv_a_proj_with_mqa" and place.shape[0] == rank + turned:
        return fused(latent=rank, k=turned)
    if place.child == "kv_b_proj" and place.shape[0] == count * (plain + value) and count:
        return fused(k=count * plain, v=count * value, heads=count, interleaved=count)
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
    ("kv_a_proj_with_mqa", ("Attention",), latent),
    ("kv_b_proj", ("Attention",), latent),
]
"""Names of Linears, the classes that hold them, and how they are stored."""


def linear(place: Place) -> Declared | str:
    """How a Linear is stored; words for one that several matrices may share."""
    for child, owners, read in _LINEAR:
        if place.child == child and place.within(*owners) and (found := read(place)):
            return found
    known = from_package(place.parent, "transformers")
    if known and place.child == "gate_up_proj" and (found := halves(place)):
        return found
    if known and place.child == "qkv" and place.shape[0] == 3 * place.shape[1]:
        return thirds(place) or "its name says that q, k and v share it"
    if (found := one_head_each(place)) is not None:
        return found
    if SINGLE.fullmatch(place.child):
        return stored()
    if FUSED.search(place.child):
        return "its name says that several matrices share it"
    return _by_size(place) or stored()


def _by_size(place: Place) -> str:
    """Words for a Linear that is as tall as several matrices of its model together."""
    rows, cols = place.shape
    inner = place.find("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner")
    if rows == 2 * inner:
        return f"its {rows} rows are twice the {inner} of its MLP"
    if _in_attention(place) and rows == 3 * cols:
        return f"its {rows} rows in an attention are 3 times its {cols} columns"
    return ""


def conv1d(place: Place) -> Declared | str:
    """Conv1D of transformers, stored (d_in, d_out): `c_attn` holds q, k, v, or k and v."""
    d_in, d_out = place.shape
    if place.child == "c_attn" and d_out in (2 * d_in, 3 * d_in):
        names = ("q", "k", "v")[-(d_out // d_in) :]
        sizes = dict.fromkeys(names, d_in)
        return fused(**sizes, heads=_heads(place, d_in), transposed=True)
    if FUSED.search(place.child):
        return "its name says that several matrices share it"
    heads = _heads(place, d_in if place.child == "c_proj" else d_out)
    if heads and _in_attention(place) and place.child in ("c_proj", "q_attn"):
        return stored(transposed=True, heads=heads, head_axis=int(place.child == "c_proj"))
    return stored(transposed=True)


def convolution(place: Place) -> Declared:
    """A convolution: one matrix (d_out, d_in positions) for each group of channels."""
    groups: int = place.module.groups  # type: ignore[assignment]
    if place.shape[1] == 1 and groups > 1:  # each channel by itself: no matrix
        return Declared(Role.OTHER)
    splits = (place.shape[0] // groups,) * groups if groups > 1 else ()
    return stored(kernel=len(place.shape) - 2, splits=splits)


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
    if any("norm" in name.lower() for name in names[:-2]):
        return Declared(Role.GAIN)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
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


def _is_linear(place: Place) -> bool:
    module: Any = place.module
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    named = isinstance(module, nn.Linear) or any("Linear" in name for name in classes(module))
    return place.leaf == "weight" and named and sizes == place.shape


def _vector(shape: tuple[int, ...]) -> bool:
    """Whether all entries lie along one dimension."""
    return max(shape) == math.prod(shape)
