"""What a network does at most: sizes of activations and sensitivities, node by node."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geon.optim.modular.bonds import Normalize
from geon.optim.modular.nodes import (
    Atom,
    Network,
    Number,
    Reading,
    Series,
    Trace,
    Values,
    WeightSize,
)


@dataclass(frozen=True)
class Row:
    """Bounds at one node.

    Attributes:
        name: path of the node, or what it is.
        rms: of the largest RMS of a token's vector.
        most: of the magnitude of an entry.
        lipschitz: of the change (largest RMS of a token) for a change of the first activation by 1.
        smallest: RMS that the bounds from here on assume to have entered; None for other nodes.
    """

    name: str
    rms: float
    most: float
    lipschitz: float
    smallest: float | None = None


@dataclass(frozen=True)
class Certificate:
    """Bounds of a network, bottom up.

    Attributes:
        rows: of all nodes, in the order in which they act.
        tokens: that were run to observe what enters each RMSNorm; 0 where nothing was.
    """

    rows: tuple[Row, ...]
    tokens: int = 0

    @property
    def lipschitz(self) -> float:
        """Sensitivity of the logits to the first activation."""
        return self.rows[-1].lipschitz

    @property
    def conditional(self) -> bool:
        """Whether sensitivities hold only for inputs of a certain size."""
        return any(row.smallest is not None for row in self.rows)

    @property
    def condition(self) -> str:
        """What the bounds hold for, in words."""
        if not self.conditional:
            return "The bounds hold for every input."
        sizes = "Bounds of activations hold for every input; those of sensitivity "
        if not self.tokens:
            return f"{sizes}too, but nothing was observed, so every RMSNorm counts as 1/sqrt(eps)."
        return (
            f"{sizes}are conditional: they hold between inputs of which no vector that enters an "
            f"RMSNorm is smaller than the smallest observed over {self.tokens:,} tokens."
        )

    def table(self) -> str:
        """The certificate for people."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'node':<{width}} {'RMS <=':>11} {'entry <=':>11} {'Lipschitz <=':>13}"]
        for row in self.rows:
            told = "" if row.smallest is None else f"  if RMS >= {row.smallest:.3g}"
            numbers = f"{row.rms:>11.4g} {row.most:>11.4g} {row.lipschitz:>13.4g}"
            lines.append(f"{row.name:<{width}} {numbers}{told}")
        return "\n".join([*lines, "", self.condition])

    def to_dict(self) -> dict[str, Any]:
        """In plain containers: for the log, and JSON. Bounds that overflow are null."""
        last = self.rows[-1]
        return {
            "lipschitz": _finite(last.lipschitz),
            "logits_rms": _finite(last.rms),
            "logits_most": _finite(last.most),
            "conditional": self.conditional,
            "tokens_observed": self.tokens,
            "nodes": [
                {
                    "name": row.name,
                    "rms": _finite(row.rms),
                    "most": _finite(row.most),
                    "lipschitz": _finite(row.lipschitz),
                    "smallest": row.smallest,
                }
                for row in self.rows
            ],
        }


def measure(
    network: Network, whole: Callable[[str], Tensor], keep: bool = True
) -> dict[Atom, WeightSize]:
    """Certified bounds of all weights; one whole parameter is in memory at a time.

    whole: gives a whole parameter by name; it gathers a sharded one, so every rank must call.
    keep: whether this rank measures, or only helps to gather.

    Cost: per matrix, 11 products of its short side's Gram with itself and the Gram, in fp64.
    """
    places: dict[str, list[Atom]] = {}
    for atom in network.places():
        places.setdefault(atom.param, []).append(atom)
    found = {}
    for param, atoms in places.items():
        value = whole(param)
        for atom in atoms if keep else ():
            found[atom] = atom.measure(atom.take(value))
    return found


@torch.no_grad()
def observe(network: Network, whole: Callable[[str], Tensor], tokens: Tensor) -> dict[str, float]:
    """Smallest RMS that enters each RMSNorm for tokens (batch, time), in fp32.

    whole: as for `measure`.
    """
    values = Values(lambda atom: atom.take(whole(atom.param).float()))
    network.forward(tokens, values)
    return {place: float(sizes.min()) for place, sizes in values.smallest.items()}


def certificate(
    network: Network,
    sizes: Mapping[Atom, WeightSize],
    smallest: Mapping[str, float] | None = None,
    tokens: int = 0,
) -> Certificate:
    """Bounds of a network whose weights have been measured.

    smallest, tokens: what was observed, and over how many tokens.
    """
    source, body = network.trace(Reading(sizes, smallest or {}))
    rows = [*_rows(source, None, True), *_rows(body, 1.0, True)]
    return Certificate(tuple(rows), tokens)


def _rows(trace: Trace, before: Number | None, last: bool) -> Iterator[Row]:
    """Rows of a trace; `before`: sensitivity of what enters, None for tokens."""
    if trace.parts:
        inner = before
        for part in trace.parts:
            yield from _rows(part, inner, False)
            if isinstance(trace.node, Series) and inner is not None:
                inner = inner * part.lipschitz
        if isinstance(trace.node, Series):
            return
    node = trace.node
    lipschitz = 1.0 if before is None else float(before * trace.lipschitz)
    if isinstance(node, Normalize):
        yield _row(node.place, trace, lipschitz, _assumed(trace, node))
    elif isinstance(node, Atom):
        yield _row(node.key, trace, lipschitz)
    elif trace.parts or _matters(trace):
        yield _row(getattr(node, "name", "") or type(node).__name__.lower(), trace, lipschitz)


def _matters(trace: Trace) -> bool:
    """Whether a bond changes anything: a factor of 1 does not."""
    return getattr(trace.node, "factor", 0.0) != 1.0


def _assumed(trace: Trace, node: Normalize) -> float:
    return math.sqrt(max(0.0, 1.0 / float(trace.lipschitz) ** 2 - node.eps))


def _row(name: str, trace: Trace, lipschitz: float, smallest: float | None = None) -> Row:
    return Row(name, float(trace.out.rms), float(trace.out.most), lipschitz, smallest)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
