"""Which weights of a model map the last activation to its output."""

import re
from collections.abc import Iterator

from torch import nn

from geon.optim.place import FUSED
from geon.optim.tree import Tree, classes

NAMED = (
    r"(?!pre_|multi_?head)(\w+_)?(heads?|classifier)(?!_attn|_attention)(_\w+)?|score|embed_out"
    r"|unembed\w*|qa_outputs|seq_relationship|(?!pre_)\w*logits\w*|(\w+_)?pred(ictions)?"
    r"|sequence_summary|final_layer|(class|bbox)_embed"
)
"""Names of last layers, or of modules that end in one, wherever they are. Patterns are compiled
when they are first used, which spares the import."""
OUTERMOST = (
    r"out|outputs?|output_(layer|projection)|proj_out|decoder|fc_out|fc|readout|linear_out|out_proj"
    r"|(actor|critic|value|policy|advantage)(_\w+)?"
)
"""Names that inner layers have too: of last layers at the top of a model, or in a module above."""
LAST = f"{NAMED}|{OUTERMOST}|linear"
"""Names of the last layer in a module with such a name."""
BEFORE_LAST = r"dense|transform"
"""Names of what a module that ends in a tied weight does before it."""
INNER = r"(?i)attention|attn|pool"
"""Marks of classes that are no last layers, whatever their name."""


def last_layers(model: nn.Module) -> set[int]:
    """Identities of the weights of last layers.

    These are a transformers model's output embedding, and Linears with the name of a last layer or
    at the end of a module with such a name, outside numbered layers, that nothing later reads. In
    models of other packages also a Linear of the shape of an Embedding that nothing later reads;
    without any of these the Linears at the end of the model, alone or in Sequentials.
    """
    tree = Tree(model)
    output = getattr(tree.module(""), "get_output_embeddings", None)
    found = set(_named(tree))
    if callable(output):
        try:
            own = output()
        except (AttributeError, NotImplementedError):
            own = None
        found |= {path for path in tree.paths if any(m is own for m in tree.modules[path])}
    else:
        found |= set(_like_an_embedding(tree))
        found = found or set(_ends(tree))
    return {
        id(module.weight)
        for path in found
        for module in tree.modules[path]
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }


def _numbered(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _named(tree: Tree) -> Iterator[str]:
    """Paths of Linears that a name says to be last."""
    top = tree.top
    for path in tree.paths:
        above, _, name = path.rpartition(".")
        if not path or _numbered(path) or _is_inner(tree, path) or _is_inner(tree, above):
            continue
        named = re.fullmatch(NAMED, name) is not None
        outermost = above == top or re.fullmatch(NAMED, above.rpartition(".")[2])
        if named or (re.fullmatch(OUTERMOST, name) and outermost):
            for end in _end(tree, path, deep=named):
                if tree.sizes(end)[0] in tree.read_after(path, above):
                    continue
                if named or above != top or _nothing_but_ends_after(tree, path):
                    yield end


def _nothing_but_ends_after(tree: Tree, path: str) -> bool:
    """Whether what comes later beside a module ends in Linears too, as far as it has matrices."""
    beside = tree.children(path.rpartition(".")[0])
    later = [p for p in beside[beside.index(path) + 1 :] if tree.has_matrix(p)]
    return all(next(_end(tree, p, deep=True), None) is not None for p in later)


def _is_inner(tree: Tree, path: str) -> bool:
    """Whether a module is an attention or a pool, by what it holds, or inside a model its class."""
    names = [name for module in tree.modules[path] for name in classes(module)]
    if path not in ("", tree.top) and any(re.search(INNER, name) for name in names):
        return True
    within = {child.rpartition(".")[2] for child in tree.children(path)}
    return {"key", "query", "value"} <= within or {"q_proj", "k_proj"} <= within


def _end(tree: Tree, path: str, deep: bool = False) -> Iterator[str]:
    """The Linear that a module ends in, itself if it is one.

    deep: the module has the name of a last layer. A list or dict of that name has an end in each
        entry, unless one reads what the other makes; another module may end in a Linear, a
        Sequential or a list of its own, but not in a square or an inner layer.
    """
    if tree.is_linear(path):
        yield path
        return
    within = [child for child in tree.children(path) if tree.has_matrix(child)]
    several = tree.isinstance(path, nn.ModuleList | nn.ModuleDict)
    if not within or _is_inner(tree, path):
        return
    if several and deep:
        ends = [end for child in within for end in _end(tree, child, deep=True)]
        free = [e for e in ends if tree.sizes(e)[0] not in tree.read_after(e, path)]
        yield from free or ends[-1:]
    elif several or tree.isinstance(path, nn.Sequential):
        yield from _end(tree, within[-1])
    elif deep:
        names = {child: child.rpartition(".")[2] for child in within}
        told = [c for c, n in names.items() if re.fullmatch(LAST, n)]
        for end in _end(tree, (told or within)[-1]):
            square = len(set(tree.sizes(end))) == 1
            if told or not (square or re.fullmatch(BEFORE_LAST, names[within[-1]])):
                yield end


def _like_an_embedding(tree: Tree) -> Iterator[str]:
    """The Linear outside numbered layers of the shape of an Embedding's weight; none if several.

    The last Linear of all need only be as wide as one is long. What a later module reads is none.
    """
    tables = {
        (module.num_embeddings, module.embedding_dim)
        for modules in tree.modules.values()
        for module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    linears = [path for path in tree.paths if tree.is_linear(path)]
    tables |= {(rows, tree.sizes(path)[1]) for path in linears[-1:] for rows, _ in tables}
    alike = [
        path
        for path in linears
        if not _numbered(path)
        and tree.sizes(path) in tables
        and tree.sizes(path)[0] not in tree.read_after(path, "")
    ]
    if len(alike) == 1:
        yield from alike


def _ends(tree: Tree) -> Iterator[str]:
    """The Linear at the end of the model, and those beside it: narrower, of the same input.

    There is none where another kind of module with a matrix is the end, or a square Linear.
    """
    top = tree.top
    children = [path for path in tree.children(top) if tree.has_matrix(path)]
    if tree.isinstance(top, nn.Sequential) or len(children) < 2:
        for path in [top] if tree.isinstance(top, nn.Sequential) else children:
            if tree.isinstance(path, nn.Sequential):
                yield from _end(tree, path)
        return
    read = None
    for path in reversed(children):
        end = next(_end(tree, path), None)
        if end is None or re.search(FUSED, end):
            return
        first = next(p for p in tree.below(path) if tree.is_linear(p))
        rows, cols = tree.sizes(end)
        beside = read is None or (read == tree.sizes(first)[1] and rows < cols)
        if not beside or rows in tree.read_after(path, top) or (end == path and rows == cols):
            return
        read = tree.sizes(first)[1]
        yield end
