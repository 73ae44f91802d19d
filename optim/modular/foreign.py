"""Decoders that others wrote as trees of modules, for their budget; refused when unknown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from geon.errors import UsageError
from geon.optim.modular.atoms import Embed, Linear
from geon.optim.modular.bonds import Add, Attention, Contraction, Multiply, Normalize, residual
from geon.optim.modular.nodes import Join, Meeting, Network, Node, Series
from geon.optim.roles import ParamInfo, Role
from geon.optim.tree import bare, classes


@dataclass(frozen=True)
class Layer:
    """Where the matrices of a pre-norm decoder layer are, by the paths of their modules.

    Attributes:
        read: of queries, keys and values: three, or one that fuses them.
        out: of the attention's output.
        up: of the MLP: its first matrix, or gate and up.
        down: of the MLP's last.
    """

    read: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str


_LLAMA = Layer(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
_GPT2 = Layer(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj")
_NEOX = Layer(
    ("attention.query_key_value",), "attention.dense", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"
)

LAYERS: dict[str, Layer] = {
    "GPT2Block": _GPT2,
    "GPTNeoXLayer": _NEOX,
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Block": _GPT2,  # nanoGPT
}
"""By class of a layer; all of these are residual, and normalise what a branch reads."""


def describe(model: nn.Module, infos: Sequence[ParamInfo]) -> Network:
    """A model as a tree: its own, from a method `modular()`, or that of known decoder layers.

    infos: as `classify` declares the parameters.

    Raises:
        UsageError: a hidden matrix that lies outside of known layers, or a model without an
            embedding; names it, and what is known.
    """
    for module in model.modules():
        method = getattr(type(module), "modular", None)
        if callable(method):
            own: Network = module.modular()  # type: ignore[operator]
            _check_covered(own, infos)
            return own
    known = {bare(info.name): info for info in infos}
    blocks = []
    for path, module in model.named_modules():
        kind = next((one for one in classes(module) if one in LAYERS), None)
        if kind is not None:
            parallel = getattr(module, "use_parallel_residual", False)
            blocks.append(_block(bare(path), LAYERS[kind], known, parallel))
    tables = [info for info in infos if info.role in (Role.EMBEDDING, Role.TIED)]
    if not tables:
        raise UsageError("optim.budget=modular: the model has no embedding, so it is no decoder")
    sources: tuple[Node, ...] = tuple(Embed(info.name, info.matrix) for info in tables)
    source = sources[0] if len(sources) == 1 else Join(sources, Add())
    heads = [info for info in infos if info.role in (Role.HEAD, Role.TIED)]
    ends = [Linear(info.name, info.matrix, norm="sign") for info in heads[:1]]
    width = tables[0].matrix[1]
    body = (Series(tuple(blocks), "blocks", 5.0), Normalize("norm", width, 0.0), *ends)
    network = Network(source, Series(body))
    _check_covered(network, infos)
    return network


def _block(path: str, layer: Layer, known: Mapping[str, ParamInfo], parallel: bool) -> Series:
    """One decoder layer; parallel: both branches read the same stream."""

    def matrix(place: str) -> list[Linear]:
        info = known.get(f"{path}.{place}.weight")
        if info is None:
            raise UsageError(
                f"optim.budget=modular: the layer '{path}' has no matrix '{place}.weight', which "
                "layers of its class have here; set budget=flat"
            )
        parts = max(1, len(info.splits))
        return [Linear(info.name, info.matrix, part, parts) for part in range(parts)]

    def join(places: Sequence[str], bond: Meeting) -> Node:
        atoms = [atom for place in places for atom in matrix(place)]
        return atoms[0] if len(atoms) == 1 else Join(tuple(atoms), bond)

    mix = Series((join(layer.read, Attention(1, 1, 1.0)), *matrix(layer.out)))
    act = Series((join(layer.up, Multiply()), Contraction(), *matrix(layer.down)))
    first, second = (Series((Normalize(path, 1, 0.0), branch)) for branch in (mix, act))
    if parallel:
        return Series((residual(Join((first, second), Add())),), path)
    return Series((residual(first), residual(second)), path)


def _check_covered(network: Network, infos: Sequence[ParamInfo]) -> None:
    covered = {bare(atom.param) for atom in network.places()}
    for info in infos:
        if info.role is Role.HIDDEN and bare(info.name) not in covered:
            raise UsageError(
                f"optim.budget=modular: nothing is known of what '{info.name}' does in its model. "
                f"Known layers: {', '.join(LAYERS)}; or give the model a method modular() that "
                "returns a geon.optim.modular.Network; or set budget=flat"
            )
