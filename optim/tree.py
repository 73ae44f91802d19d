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
        return any(isinstance(m, nn.Linear) or "Conv1D" in classes(m) for m in self.modules[path])

    def within(self, path: str, kind: str) -> bool:
        """Whether the module at a path is of a class with these words in its name."""
        return any(kind in name for module in self.modules[path] for name in classes(module))

    def has_matrix(self, path: str) -> bool:
        """Whether a module holds a weight of two dimensions or more, itself or below it."""
        return any(p.dim() > 1 for m in self.modules[path] for p in m.parameters())

    def sizes(self, path: str) -> tuple[int, int]:
        """Outputs and inputs of a Linear."""
        weight: Any = next(m for m in self.modules[path] if hasattr(m, "weight")).weight
        rows, cols = weight.shape
        turned = any("Conv1D" in classes(module) for module in self.modules[path])
        return (cols, rows) if turned else (rows, cols)

    def read(self, path: str, scope: str) -> set[int]:
        """Numbers of inputs that modules below `scope`, but for those at or below `path`, take."""
        found: set[int] = set()
        inside = f"{scope}." if scope else ""
        for other, modules in self.modules.items():
            if other == path or other.startswith(f"{path}.") or not other.startswith(inside):
                continue
            found |= {int(size) for m in modules for size in _inputs(m)}
        return found


def _inputs(module: Any) -> list[int]:
    """Sizes of what a module reads."""
    if "Conv1D" in classes(module) and hasattr(module, "nx"):
        return [module.nx]
    names = ("in_features", "in_channels", "input_size", "embed_dim", "num_features")
    shape = getattr(module, "normalized_shape", ())
    own = [getattr(module, name, None) for name in names]
    return [size for size in (*own, *shape[-1:]) if isinstance(size, int)]
