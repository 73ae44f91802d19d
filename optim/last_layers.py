"""Which weights of a model map the last activation to its output."""

import re
from collections.abc import Iterator

from torch import nn

from geon.optim.families import FUSED
from geon.optim.tree import Tree

NAMED = re.compile(
    r"(\w+_)?(heads?|classifier)(_\w+)?|score|embed_out|unembed\w*|qa_outputs|seq_relationship"
    r"|\w*logits\w*|(\w+_)?pred(ictions)?|sequence_summary"
)
"""Names of last layers, or of modules that end in one, wherever they are."""
OUTERMOST = re.compile(
    r"out|outputs?|output_(layer|projection)|proj_out|decoder|fc_out|fc|readout|linear_out|out_proj"
)
"""Names that inner layers have too: of last layers at the top of a model, or in a module above."""


def last_layers(model: nn.Module) -> set[int]:
    """Identities of the weights of last layers.

    These are a transformers model's output embedding, and Linears with the name of a last layer or
    at the end of a module with such a name, outside numbered layers. In models of other packages
    also the one Linear that is as wide as a vocabulary, and that nothing reads; and the Linears at
    the end of the model, alone or in Sequentials, that nothing reads.
    """
    tree = Tree(model)
    output = getattr(tree.module(""), "get_output_embeddings", None)
    found = set(_named(tree))
    if callable(output):
        own = output()
        found |= {path for path in tree.paths if any(m is own for m in tree.modules[path])}
    elif not (found := found | set(_as_wide_as_a_vocabulary(tree))):
        found = set(_ends(tree))
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
        if not path or _numbered(path) or tree.within(above, "Attention"):
            continue
        outermost = above == top or NAMED.fullmatch(above.rpartition(".")[2])
        named = NAMED.fullmatch(name) is not None
        if named or (OUTERMOST.fullmatch(name) and outermost):
            yield from _end(tree, path, deep=named)


def _end(tree: Tree, path: str, deep: bool = False) -> Iterator[str]:
    """The Linear that a module ends in, itself if it is one; of each entry of a list or dict.

    deep: look into modules that are no Sequentials, and leave square Linears there: these lie
        before the last one.
    """
    if tree.is_linear(path):
        yield path
        return
    within = [child for child in tree.children(path) if tree.has_matrix(child)]
    if deep and tree.isinstance(path, nn.ModuleList | nn.ModuleDict):
        for child in within:
            yield from _end(tree, child, deep)
    elif within and (deep or tree.isinstance(path, nn.Sequential)):
        square = tree.is_linear(within[-1]) and len(set(tree.sizes(within[-1]))) == 1
        if not (square and deep and not tree.isinstance(path, nn.Sequential)):
            yield from _end(tree, within[-1], deep)


def _as_wide_as_a_vocabulary(tree: Tree) -> Iterator[str]:
    """The Linear outside numbered layers that is as wide as an Embedding is long.

    None if there are several, or if another module reads that many.
    """
    tables = {
        module.num_embeddings
        for modules in tree.modules.values()
        for module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    wide = [
        path
        for path in tree.paths
        if tree.is_linear(path)
        and not _numbered(path)
        and tree.sizes(path)[0] in tables
        and tree.sizes(path)[0] not in tree.read(path, "")
    ]
    if len(wide) == 1:
        yield from wide


def _ends(tree: Tree) -> Iterator[str]:
    """Linears at the end of the model's own modules whose output no other of these reads."""
    top = tree.top
    children = [path for path in tree.children(top) if tree.has_matrix(path)]
    if tree.isinstance(top, nn.Sequential):
        yield from _end(tree, top)
        return
    if len(children) < 2:
        for path in children:
            if tree.isinstance(path, nn.Sequential):
                yield from _end(tree, path)
        return
    ends = {path: end for path in children for end in _end(tree, path)}
    ends = {path: end for path, end in ends.items() if not FUSED.search(end)}
    free = [p for p, end in ends.items() if tree.sizes(end)[0] not in tree.read(p, top)]
    run: list[str] = []
    for path in reversed(children):
        if path not in free:
            break
        run.append(path)
    chosen = run or (free if len(free) == 1 else [])
    yield from (ends[path] for path in chosen)
