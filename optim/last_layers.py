"""Which weights of a model map the last activation to its output."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from geon.optim.families import classes

HEADS = re.compile(
    r"(lm_|mlm_|cls_|score_|action_)?heads?|score|classifier|decoder|embed_out|unembed(ding)?"
    r"|output|output_layer|output_projection|proj_out|qa_outputs|logits|fc_out|out"
)
"""Names of a last layer."""
WRAPPERS = re.compile(
    r"module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|base_model"
    r"|original_module|modules_to_save"
)
"""Names that wrappers put into a path: compile, DDP, FSDP, checkpointing, LoRA."""


def bare(name: str) -> str:
    """A name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if not WRAPPERS.fullmatch(part))


def last_layers(model: nn.Module) -> set[int]:
    """Identities of the weights of last layers.

    These are a transformers model's output embedding; Linears with the name of a last layer, or at
    the end of a Sequential with such a name; the end of an outermost Sequential. If there are none:
    the last Linear that is as wide as the vocabulary, or that is the last of the model's own
    modules. What lies in one of several numbered layers is none of these, but for the Sequentials.
    """
    root = _unwrapped(model)
    output = getattr(root, "get_output_embeddings", None)
    modules = {path: module for path, module in root.named_modules() if _single(path)}
    found = [output() if callable(output) else None, _end(root, isinstance(root, nn.Sequential))]
    for path, module in modules.items():
        *above, name = path.split(".")
        around = classes(root.get_submodule(".".join(above)))
        named = HEADS.fullmatch(name) is not None
        if name == "out_proj":
            named = any("ClassificationHead" in kind for kind in around)
        if named and not any("Attention" in kind for kind in around):
            found.append(module if _is_linear(module) else _end(module, False))
    if not any(_is_linear(module) for module in found):
        tokens = [m.num_embeddings for m in root.modules() if isinstance(m, nn.Embedding)]
        linears = [module for module in modules.values() if _is_linear(module)]
        wide = [m for m in linears if tokens and m.weight.shape[0] == max(tokens)]
        several = sum(_has_matrix(child) for child in root.children()) > 1
        found += wide[-1:] or [_end(root, True) if several and not callable(output) else None]
    return {id(module.weight) for module in found if module is not None and _is_linear(module)}


def _single(path: str) -> bool:
    """Whether a path lies in no numbered layer."""
    return bool(path) and not any(part.isdigit() for part in path.split("."))


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear) or (module is not None and "Conv1D" in classes(module))


def _end(module: nn.Module, direct: bool) -> Any:
    """The Linear at the end of a module, inside nothing but Sequentials.

    direct: whether it may be a child of the module itself, if that is no Sequential.
    """
    within = [child for child in module.children() if _has_matrix(child)]
    if not within:
        return None
    if _is_linear(within[-1]):
        return within[-1] if direct or isinstance(module, nn.Sequential) else None
    return _end(within[-1], False) if isinstance(within[-1], nn.Sequential) else None


def _has_matrix(module: nn.Module) -> bool:
    return any(param.dim() > 1 for param in module.parameters())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside compile, DDP, checkpointing and LoRA."""
    inner = list(_inner(model))
    return _unwrapped(inner[0]) if inner else model


def _inner(model: nn.Module) -> Iterator[nn.Module]:
    for name, child in model.named_children():
        if WRAPPERS.fullmatch(name) and sum(1 for _ in model.children()) == 1:
            yield child
