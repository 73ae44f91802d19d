"""Parts of the architectures as trees of modules (optim/modular), named as their parameters are."""

from geon.models.shapes import DecoderShape, Shape
from geon.optim.modular import (
    Attention,
    Bias,
    Bond,
    Embed,
    Gain,
    Join,
    Linear,
    Network,
    Node,
    Normalize,
    Scale,
    Series,
    Softcap,
)

MASSES = (1.0, 5.0, 1.0)
"""Of embedding, all blocks together and head, as in Modula's GPT (github.com/modula-systems)."""


def matrix(
    path: str,
    d_in: int,
    d_out: int,
    bias: bool = False,
    gains: bool = False,
    part: int = 0,
    parts: int = 1,
) -> Series:
    """A linear layer at a path, with bias or gains; one of equal parts of a fused one."""
    nodes: list[Node] = [Linear(f"{path}.weight", (d_out, d_in), part, parts)]
    if gains:
        nodes.insert(0, Gain(f"{path}.cols", (d_in,)))
        nodes.append(Gain(f"{path}.rows", (d_out,), part, parts))
    if bias:
        nodes.append(Bias(f"{path}.bias", (d_out,), part, parts))
    return Series(tuple(nodes), f"{path}[{part}]" if parts > 1 else path)


def attention(
    path: str,
    shape: DecoderShape,
    scale: float,
    turn: tuple[Bond, ...],
    bias: bool = False,
    gains: bool = False,
) -> Series:
    """The attention at a path: projections, what turns queries and keys, and the output matrix.

    turn: bonds on queries and keys; a Normalize is named after what it normalises.
    """
    d, read = shape.d_model, []
    for part, word in enumerate("qkv"):
        own = f"{path}proj_in.{'qkv' if shape.fused_qkv else word}"
        fused = (part, 3) if shape.fused_qkv else (0, 1)
        layer = matrix(own, d, d, bias, gains, *fused)
        bonds = () if word == "v" else tuple(_named(bond, f"{path}{word}") for bond in turn)
        read.append(Series((*layer.nodes, *bonds), layer.name))
    heads = Attention(shape.n_head, shape.head_dim, scale)
    joined = Join(tuple(read), heads, f"{path}heads")
    out = matrix(f"{path}proj_out", d, d, bias, gains)
    return Series((joined, out), path.rstrip("."))


def _named(bond: Bond, place: str) -> Bond:
    if isinstance(bond, Normalize):
        return Normalize(f"{place}.norm", bond.width, bond.eps, bond.heads, bond.center)
    return bond


def mlp(
    path: str, shape: DecoderShape, activation: Bond, bias: bool = False, gains: bool = False
) -> Series:
    """The MLP of the block at a path."""
    d, width = shape.d_model, shape.mlp_width
    up = matrix(f"{path}.up", d, width, bias, gains)
    return Series((up, activation, matrix(f"{path}.down", width, d, bias, gains)), f"{path}.mlp")


def network(
    source: Node,
    first: tuple[Node, ...],
    blocks: list[Series],
    last: tuple[Node, ...],
    shape: Shape,
    tied: str = "",
    bias: bool = False,
    rational: bool = False,
) -> Network:
    """The whole: blocks between what comes first and last, then head, scale and softcap.

    tied: name of the embedding that is the head as well.
    """
    ends = (shape.vocab_size, shape.d_model)
    head: list[Node] = [Linear(tied or "head.weight", ends, norm="sign", own_mass=MASSES[2])]
    if bias:
        head.append(Bias("head.bias", ends[:1]))
    head.append(Scale(shape.shrink))
    if shape.softcap:
        head.append(Softcap(shape.softcap, rational))
    middle = Series(tuple(blocks), "blocks", MASSES[1])
    return Network(source, Series((*first, middle, *last, Series(tuple(head), "head"))))


def table(shape: Shape, tied: bool) -> Embed:
    """The embedding of tokens, in the norm of a head where it is one."""
    ends = (shape.vocab_size, shape.d_model)
    return Embed("embed.weight", ends, "sign" if tied else "colnorm", MASSES[0])
