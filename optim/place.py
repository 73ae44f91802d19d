"""Where a parameter is in a model that somebody else wrote: what can be read from that."""

import re
from dataclasses import dataclass

from torch import nn

from geon.optim.tree import classes

FUSED = (
    r"(?i)qkv|query_key|key_value|queries_keys|c_attn|gate_up|up_gate|q_gate|fused|ada_?ln"
    r"|\bin_proj(_ba)?\b|(^|_)x_proj|kv_([ab]_)?proj|index_qk|(^|_|\bto_|w)(kv|qk)(_|\b|linear)"
    r"|(^|_)w(12|13)\b"
)
"""Marks in a name of a weight that several matrices may share."""
PASSED_ON = r"linear|conv|convolution|proj|dense|c|l|\d+"
"""Names that say nothing: the module above has the name."""


@dataclass(frozen=True)
class Place:
    """Where a parameter is: what its layout can be read from.

    Attributes:
        leaf: name in its module.
        shape: of the whole parameter.
        module: that holds it.
        path: of that module, wrappers left out.
        parents: of the module, the nearest first; wrappers left out.
    """

    leaf: str
    shape: tuple[int, ...]
    module: nn.Module
    path: str
    parents: tuple[nn.Module, ...]

    @property
    def child(self) -> str:
        """Name of the module in its parent."""
        return self.path.rpartition(".")[2]

    @property
    def fused(self) -> str:
        """Words if the name of the module says that several matrices share its weight; or ''."""
        *_, above, name = ["", *self.path.split(".")]
        told = re.search(FUSED, name) or (re.fullmatch(PASSED_ON, name) and re.search(FUSED, above))
        return "its name says that several matrices share it" if told else ""

    @property
    def parent(self) -> nn.Module:
        """The module that holds this one; itself at the root."""
        return self.parents[0] if self.parents else self.module

    def find(self, *names: str) -> int:
        """The first of these numbers in the module, its parents and their configs; 0 for none."""
        for holder in (self.module, *self.parents):
            for source in (holder, getattr(holder, "config", None)):
                for name in names:
                    try:
                        value = getattr(source, name, None)
                    except Exception:  # configs whose layers differ refuse to name one number
                        continue
                    if isinstance(value, int) and value > 0:
                        return int(value)
        return 0

    def within(self, *names: str) -> bool:
        """Whether the parent is of a class, or derived from one, whose name ends so."""
        return any(name.endswith(names) for name in classes(self.parent))


def from_package(module: nn.Module, package: str) -> bool:
    """Whether a module's class, or one that it derives from, is of a package."""
    return any(kind.__module__.split(".")[0] == package for kind in type(module).__mro__)
