"""A network as a tree of modules, each with a forward function, bounds, a mass and sensitivities.

The rules are those of Large et al. (arXiv 2405.14813) and Bernstein and Newhouse (arXiv
2410.21265); docs/theory.md writes them down. Activations are (batch, time, d), and the
size of one is the largest RMS of a token's vector.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor
"""A bound, or one for each input of a batch."""


def least(a: Number, b: Number) -> Number:
    """The smaller of two bounds."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        kind = torch.float64
        return torch.minimum(torch.as_tensor(a, dtype=kind), torch.as_tensor(b, dtype=kind))
    return min(a, b)


@dataclass(frozen=True)
class Size:
    """Bounds of an activation, over all tokens.

    Attributes:
        rms: of the RMS of a token's vector.
        most: of the magnitude of an entry.
        head: of the RMS of one head's share of a vector, where something bounds it apart.
    """

    rms: Number
    most: Number
    head: Number | None = None

    def scaled(self, factor: Number) -> "Size":
        """Bounds of the activation times a factor."""
        head = None if self.head is None else self.head * factor
        return Size(self.rms * factor, self.most * factor, head)


ONE = Size(1.0, 1.0)


@dataclass(frozen=True)
class WeightSize:
    """Bounds of a weight.

    Attributes:
        gain: RMS -> RMS norm of a matrix, largest magnitude of a gain, largest RMS of a row of an
            embedding, RMS of a bias.
        most: 2-norm of the largest row of a matrix; largest magnitude of the others.
    """

    gain: float
    most: float


@dataclass(frozen=True)
class Reading:
    """What stands for the weights where a network is traced.

    Without weights it is the unit reading of the sources: every weight has norm 1, every
    bond is scaled to sensitivity 1 and keeps the size of its input, and a vector that is normalised
    was as large as its bound.

    Attributes:
        weights: bounds by atom; None for the unit reading.
        smallest: smallest RMS that entered each RMSNorm, by its place; one that is missing may
            have been 0.
    """

    weights: Mapping["Atom", WeightSize] | None = None
    smallest: Mapping[str, Number] = field(default_factory=dict)

    @property
    def unit(self) -> bool:
        """Whether this is the unit reading."""
        return self.weights is None


UNIT = Reading()


@dataclass
class Values:
    """What a forward pass reads: weights by atom. It notes what enters each RMSNorm.

    Attributes:
        weight: the whole weight of an atom.
        smallest: by place of an RMSNorm, the smallest RMS of each input of the batch; (batch,).
        noting: whether to fill it in.
    """

    weight: Callable[["Atom"], Tensor]
    smallest: dict[str, Tensor] = field(default_factory=dict)
    noting: bool = True

    def note(self, place: str, sizes: Tensor) -> None:
        """Keep the smaller of these sizes and what is known."""
        known = self.smallest.get(place)
        self.smallest[place] = sizes if known is None else torch.minimum(known, sizes)


@dataclass(frozen=True)
class Trace:
    """A node with its bounds at one place of a network.

    Attributes:
        node: the node.
        into: bounds of what enters.
        out: bounds of what leaves.
        lipschitz: sensitivity to what enters, in the largest RMS of a token.
        parts: of a composition.
        shares: of a join: its sensitivity to each part.
    """

    node: "Node"
    into: Size
    out: Size
    lipschitz: Number
    parts: tuple["Trace", ...] = ()
    shares: tuple[Number, ...] = ()


class Node(ABC):
    """A module: a forward function with bounds; atoms have weights, bonds have none."""

    name: str = ""

    @abstractmethod
    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds of this module for an input of this size."""

    @abstractmethod
    def forward(self, x: Any, values: Values) -> Any:
        """Apply the module to activations (batch, time, d)."""

    def atoms(self) -> Iterator["Atom"]:
        """The atoms of this module, in order; one that is read twice comes twice."""
        return iter(())

    @property
    def mass(self) -> float:
        """Share of the change that this module is to make, beside that of others; bonds have 0."""
        return 0.0

    def masses(self, scale: float = 1.0) -> Iterator[tuple["Atom", float]]:
        """Mass of each atom, times `scale`."""
        return iter(())


class Atom(Node):
    """A module with one weight; one of several matrices that share a parameter, too."""

    param: str
    part: int = 0
    parts: int = 1
    norm: str
    own_mass: float = 1.0

    @property
    def key(self) -> str:
        """Name of the parameter, with the number of the part where several share it."""
        return self.param if self.parts == 1 else f"{self.param}[{self.part}]"

    def take(self, value: Tensor) -> Tensor:
        """This atom's part of a whole parameter."""
        return value if self.parts == 1 else value.chunk(self.parts)[self.part]

    @abstractmethod
    def change(self, into: Size) -> Number:
        """Change of the output (RMS) for a change of the weight by 1 in its norm, at most."""

    @abstractmethod
    def measure(self, value: Tensor) -> WeightSize:
        """Bounds of a whole weight; certified, so never below the truth."""

    def atoms(self) -> Iterator["Atom"]:
        """The atom itself."""
        yield self

    @property
    def mass(self) -> float:
        """Mass as it was given."""
        return self.own_mass

    def masses(self, scale: float = 1.0) -> Iterator[tuple["Atom", float]]:
        """Its mass, times `scale`."""
        yield self, self.own_mass * scale


class Bond(Node):
    """A module without weights, of one input."""

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds of the bond; in the unit reading, of the bond scaled to sensitivity 1."""
        out, lipschitz = (x, 1.0) if reading.unit else self.bound(x)
        return Trace(self, x, out, lipschitz)

    @abstractmethod
    def bound(self, x: Size) -> tuple[Size, Number]:
        """Bounds of the output and sensitivity, both certified."""


class Meeting(ABC):
    """A bond of several inputs."""

    name: str = ""

    @abstractmethod
    def bound(self, xs: list[Size]) -> tuple[Size, tuple[Number, ...]]:
        """Bounds of the output, and the sensitivity to each input, both certified."""

    def unit(self, xs: list[Size]) -> tuple[Size, tuple[Number, ...]]:
        """The same of the bond scaled to sensitivity 1 in all: each input has a like share."""
        return xs[-1], (1.0 / len(xs),) * len(xs)

    @abstractmethod
    def forward(self, xs: list[Tensor]) -> Tensor:
        """Apply the bond."""


@dataclass(frozen=True)
class Series(Node):
    """One module after the other: sensitivities multiply, masses add.

    Attributes:
        nodes: in the order in which they act.
        name: for tables.
        total: mass of the whole, shared in the proportions that the parts have; None adds theirs.
    """

    nodes: tuple[Node, ...]
    name: str = ""
    total: float | None = None

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds from first to last."""
        parts: list[Trace] = []
        lipschitz: Number = 1.0
        for node in self.nodes:
            parts.append(node.trace(parts[-1].out if parts else x, reading))
            lipschitz = lipschitz * parts[-1].lipschitz
        return Trace(self, x, parts[-1].out if parts else x, lipschitz, tuple(parts))

    def forward(self, x: Any, values: Values) -> Any:
        """Apply one after the other."""
        for node in self.nodes:
            x = node.forward(x, values)
        return x

    def atoms(self) -> Iterator[Atom]:
        """Atoms of all."""
        for node in self.nodes:
            yield from node.atoms()

    @property
    def mass(self) -> float:
        """Mass as given, or the sum."""
        own = sum(node.mass for node in self.nodes)
        return own if self.total is None or not own else self.total

    def masses(self, scale: float = 1.0) -> Iterator[tuple[Atom, float]]:
        """Masses of all atoms, times `scale`."""
        own = sum(node.mass for node in self.nodes)
        share = self.mass / own if own else 1.0
        for node in self.nodes:
            yield from node.masses(scale * share)


@dataclass(frozen=True)
class Join(Node):
    """Modules that read the same input, and a bond that joins what they give.

    Sensitivities are multiplied by that of the bond to each part, and added; masses add.
    """

    nodes: tuple[Node, ...]
    bond: Meeting
    name: str = ""

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds of the parts, and of the bond."""
        parts = tuple(node.trace(x, reading) for node in self.nodes)
        sizes = [part.out for part in parts]
        out, shares = self.bond.unit(sizes) if reading.unit else self.bond.bound(sizes)
        lipschitz: Number = 0.0
        for part, share in zip(parts, shares, strict=True):
            lipschitz = lipschitz + share * part.lipschitz
        return Trace(self, x, out, lipschitz, parts, shares)

    def forward(self, x: Any, values: Values) -> Tensor:
        """Apply the parts, and join them."""
        return self.bond.forward([node.forward(x, values) for node in self.nodes])

    def atoms(self) -> Iterator[Atom]:
        """Atoms of all parts."""
        for node in self.nodes:
            yield from node.atoms()

    @property
    def mass(self) -> float:
        """Sum of the parts'."""
        return sum(node.mass for node in self.nodes)

    def masses(self, scale: float = 1.0) -> Iterator[tuple[Atom, float]]:
        """Masses of all atoms, times `scale`."""
        for node in self.nodes:
            yield from node.masses(scale)


@dataclass(frozen=True)
class Network:
    """A language model: what turns tokens into the first activation, and all that follows.

    Sensitivities to the input are counted from that activation on, as tokens have no size.
    """

    source: Node
    body: Node

    def trace(self, reading: Reading = UNIT) -> tuple[Trace, Trace]:
        """Bounds of both."""
        source = self.source.trace(ONE, reading)
        return source, self.body.trace(source.out, reading)

    def forward(self, tokens: Tensor, values: Values) -> Tensor:
        """Logits (batch, time, vocab) of tokens (batch, time)."""
        out: Tensor = self.body.forward(self.source.forward(tokens, values), values)
        return out

    def places(self) -> list[Atom]:
        """All atoms, in order; a weight that is read twice has two."""
        return [*self.source.atoms(), *self.body.atoms()]

    def atoms(self) -> dict[str, Atom]:
        """By key, the first atom of each weight."""
        found: dict[str, Atom] = {}
        for atom in self.places():
            found.setdefault(atom.key, atom)
        return found

    def shares(self) -> dict[str, float]:
        """Share of the mass of each atom, by key; they sum to 1."""
        total = self.source.mass + self.body.mass
        found = dict.fromkeys(self.atoms(), 0.0)
        for node in (self.source, self.body):
            for atom, mass in node.masses():
                found[atom.key] += mass / total
        return found

    def changes(self, reading: Reading = UNIT) -> dict[str, Number]:
        """By key, the change of the output (largest RMS of a token) for a unit change of a weight.

        To first order, and at most: the size of what the atom reads times the sensitivities of all
        that follows.
        """
        source, body = self.trace(reading)
        found = _changes(source, body.lipschitz)
        for key, change in _changes(body, 1.0).items():
            found[key] = found[key] + change if key in found else change
        return found


def _changes(trace: Trace, follows: Number) -> dict[str, Number]:
    """Changes by the atoms of a trace; `follows` is the sensitivity of what comes after it."""
    if isinstance(trace.node, Atom):
        return {trace.node.key: trace.node.change(trace.into) * follows}
    found: dict[str, Number] = {}
    after = list(trace.shares)
    if isinstance(trace.node, Series):
        after, rest = [], follows
        for part in reversed(trace.parts):
            after.insert(0, rest)
            rest = rest * part.lipschitz
        follows = 1.0
    for part, share in zip(trace.parts, after, strict=True):
        for key, change in _changes(part, follows * share).items():
            found[key] = found[key] + change if key in found else change
    return found


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension."""
    return torch.linalg.vector_norm(x, dim=-1) / math.sqrt(x.shape[-1])
