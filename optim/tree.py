"""The modules of a model by path, without what wrappers put into it."""

import re
from collections import defaultdict
from functools import cached_property
from typing import Any

from torch import nn

WRAPPERS = re.compile(
    r"(?:^|\.)(?:base_model(?:\.model)?|module|_orig_mod|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|base_layer|original_module|modules_to_save\.\w+)(?=\.|$)"
)
"""What compile, DDP, FSDP, checkpointing and LoRA put into a path."""


def bare(path: str) -> str:
    """A path or a name without the parts that wrappers put into it."""
    return WRAPPERS.sub("", path).lstrip(".")


def classes(module: Any) -> list[str]:
    """Names of a module's class and its bases: fully_shard derives one of its own."""
    return [kind.__name__ for kind in type(module).__mro__]


class Tree:
    """Modules by bare path. A wrapper and what it wraps share a path, the innermost last.

    Attributes:
        modules: by path, in the order of `named_modules()`.
        paths: of all modules; the root's is "".
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, list[nn.Module]] = defaultdict(list)
        for path, module in model.named_modules():
            self.modules[bare(path)].append(module)
        self.paths = list(self.modules)
        self._children: dict[str, list[str]] = defaultdict(list)
        for path in self.paths:
            if path:
                self._children[path.rpartition(".")[0]].append(path)

    def module(self, path: str) -> nn.Module:
        """The innermost module at a path."""
        return self.modules[path][-1]

    def children(self, path: str) -> list[str]:
        """Paths of a module's own modules."""
        return self._children[path]

    def above(self, path: str) -> list[nn.Module]:
        """The modules around a path, the nearest first."""
        found = []
        while path:
            path = path.rpartition(".")[0]
            if path in self.modules:
                found.append(self.module(path))
        return found

    @cached_property
    def top(self) -> str:
        """Path of the outermost module that is more than a holder of one other."""
        path = ""
        while True:
            within = [child for child in self.children(path) if self.has_matrix(child)]
            own = any(p.dim() > 1 for m in self.modules[path] for p in m.parameters(recurse=False))
            single = len(within) == 1 and not own and not self.is_linear(within[0])
            if not single or self.isinstance(path, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                return path
            if self.isinstance(within[0], nn.Sequential | nn.ModuleList | nn.ModuleDict):
                return path
            path = within[0]

    def isinstance(self, path: str, kinds: Any) -> bool:
        """Whether the module at a path is of a kind."""
        return isinstance(self.module(path), kinds)

    def is_linear(self, path: str) -> bool:
        """Whether a path is a Linear, or one that is stored transposed."""
        return any(_is_linear(module) for module in self.modules[path])

    def below(self, path: str) -> list[str]:
        """A path and those of all modules below it."""
        return [p for p in self.paths if p == path or p.startswith(f"{path}." if path else "")]

    def has_matrix(self, path: str) -> bool:
        """Whether a module holds a weight of two dimensions or more, itself or below it."""
        return any(p.dim() > 1 for m in self.modules[path] for p in m.parameters())

    def sizes(self, path: str) -> tuple[int, int]:
        """Outputs and inputs of a Linear."""
        module: Any = next(module for module in self.modules[path] if _is_linear(module))
        rows, cols = module.weight.shape
        turned = any("Conv1D" in classes(m) for m in self.modules[path])
        return (cols, rows) if turned else (rows, cols)

    def read_after(self, path: str, scope: str) -> set[int]:
        """Numbers of inputs that modules below `scope` take, those that come after a path."""
        found: set[int] = set()
        inside, own = f"{scope}." if scope else "", set(self.below(path))
        for other in self.paths[self.paths.index(path) :]:
            if other not in own and other.startswith(inside):
                found |= {int(size) for m in self.modules[other] for size in _inputs(m)}
        return found


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear) or hasattr(module, "base_layer")
    turned = "Conv1D" in classes(module) and hasattr(module, "nf")
    return (plain or turned) and isinstance(weight, nn.Parameter) and weight.dim() == 2


def _inputs(module: Any) -> list[int]:
    """Sizes of what a module reads."""
    if "Conv1D" in classes(module) and hasattr(module, "nx"):
        return [module.nx]
    names = ("in_features", "in_channels", "input_size", "embed_dim", "num_features")
    shape = getattr(module, "normalized_shape", ())
    own = [getattr(module, name, None) for name in names]
    own += [shape] if isinstance(shape, int) else list(shape)[-1:]
    return [size for size in own if isinstance(size, int)]
