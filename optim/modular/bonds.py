"""Bonds: modules without weights, with certified bounds of their outputs and sensitivities."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from geon.optim.modular.nodes import (
    Bond,
    Join,
    Meeting,
    Node,
    Number,
    Reading,
    Series,
    Size,
    Trace,
    Values,
    least,
    rms,
)

GELU_SLOPE = 1.13
"""Above the largest slope of GELU: 1.1289 of the exact one, 1.1290 of the one by tanh."""


@dataclass(frozen=True)
class Scale(Bond):
    """Multiplication by a number."""

    factor: float

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds times the factor, in every reading: a factor is part of the network's design."""
        return Trace(self, x, *self.bound(x))

    def bound(self, x: Size) -> tuple[Size, Number]:
        """Bounds times the factor, which is the sensitivity."""
        return x.scaled(abs(self.factor)), abs(self.factor)

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Multiply."""
        return x if self.factor == 1.0 else x * self.factor


@dataclass(frozen=True)
class Normalize(Bond):
    """RMSNorm without gains, of whole vectors or of each head's share; centred: LayerNorm.

    With one more entry sqrt(d eps), x / sqrt(rms(x)^2 + eps) is what x becomes on a sphere. If
    neither of two vectors is smaller than r, the sphere may be shrunk to where it is a projection
    on a ball, which brings nothing further apart: they move by |x - y| / sqrt(r^2 + eps) at most.
    So its sensitivity is conditional on the smallest RMS, and 1 / sqrt(eps) without one.

    Attributes:
        place: name under which the smallest RMS is noted.
        width: numbers that are normalised together: d, or d / heads.
        heads: shares of a vector that are normalised apart; 0 for the whole vector.
        center: take off the mean first, which moves nothing further apart.
    """

    place: str
    width: int
    eps: float
    heads: int = 0
    center: bool = False

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Size 1, and the sensitivity 1 / smallest RMS; the bound itself in the unit reading."""
        if reading.unit:
            return Trace(self, x, Size(1.0, 1.0), 1.0 / x.rms)
        smallest = reading.smallest.get(self.place, 0.0)
        lipschitz = 1.0 / (smallest * smallest + self.eps) ** 0.5
        head = 1.0 if self.heads else None
        return Trace(self, x, Size(1.0, math.sqrt(self.width), head), lipschitz)

    def bound(self, x: Size) -> tuple[Size, Number]:
        """Bounds where nothing was observed."""
        found = self.trace(x, Reading({}))
        return found.out, found.lipschitz

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Normalise, and note the smallest RMS of each input of the batch."""
        shares = x.reshape(*x.shape[:-1], -1, self.width)
        if self.center:
            shares = shares - shares.mean(-1, keepdim=True)
        if values.noting:
            values.note(self.place, rms(shares.detach()).flatten(1).amin(1))
        square = shares.square().mean(-1, keepdim=True)
        return (shares * (square + self.eps).rsqrt()).flatten(-2)


@dataclass(frozen=True)
class SquaredRelu(Bond):
    """Scale * max(x, 0)^2, on a ball: its slope grows with the entries."""

    scale: float = 1.0

    def bound(self, x: Size) -> tuple[Size, Number]:
        """|x^2| <= most |x|, and a slope of 2 most."""
        most = x.most * self.scale
        return Size(most * x.rms, most * x.most), 2.0 * most

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Square what is positive."""
        return x.relu().square() * self.scale


@dataclass(frozen=True)
class Gelu(Bond):
    """GELU in torch's approximation by tanh, or the exact one."""

    approximate: str = "tanh"

    def bound(self, x: Size) -> tuple[Size, Number]:
        """|gelu(x)| <= |x|."""
        return Size(x.rms, x.most), GELU_SLOPE

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Apply torch's."""
        return F.gelu(x, approximate=self.approximate)


@dataclass(frozen=True)
class Contraction(Bond):
    """A function of each entry with slopes of at most 1 that keeps 0: SiLU over 1.1, ReLU."""

    word: str = "relu"

    def bound(self, x: Size) -> tuple[Size, Number]:
        """No larger, no further apart."""
        return x, 1.0

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Apply it."""
        return x.relu() if self.word == "relu" else F.silu(x) / 1.1


@dataclass(frozen=True)
class Softcap(Bond):
    """Bound c of logits: c tanh(z / c), or c z / sqrt(z^2 + c^2); slopes are at most 1."""

    cap: float
    rational: bool = False

    def bound(self, x: Size) -> tuple[Size, Number]:
        """The cap, where the input may be above it."""
        return Size(least(x.rms, self.cap), least(x.most, self.cap)), 1.0

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Cap."""
        if self.rational:
            return self.cap * x * (x.square() + self.cap**2).rsqrt()
        return self.cap * torch.tanh(x / self.cap)


@dataclass(frozen=True)
class Rotate(Bond):
    """Rotary positions: pairs (x_i, x_{i + K/2}) of each head turn, which keeps their lengths.

    frequencies: of the K/2 pairs, radians a token.
    """

    frequencies: tuple[float, ...]

    def bound(self, x: Size) -> tuple[Size, Number]:
        """An entry is at most the length of its pair."""
        return Size(x.rms, math.sqrt(2.0) * x.most, x.head), 1.0

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Turn each position's pairs by minus its angle."""
        frequency = torch.tensor(self.frequencies, dtype=x.dtype, device=x.device)
        time = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        angle = (time[:, None] * frequency)[:, None]
        first, second = x.reshape(*x.shape[:-1], -1, 2 * len(frequency)).chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat((first * cos + second * sin, second * cos - first * sin), -1)
        return turned.flatten(-2)


@dataclass(frozen=True)
class Repeat(Bond):
    """Each share of a vector several times in a row: heads of keys that queries share.

    Attributes:
        width: of a share.
        times: that it is there; its RMS stays.
    """

    width: int
    times: int

    def bound(self, x: Size) -> tuple[Size, Number]:
        """The same mean square, largest entry and largest share."""
        return x, 1.0

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Repeat."""
        shares = x.reshape(*x.shape[:-1], -1, self.width)
        return shares.repeat_interleave(self.times, -2).flatten(-2)


@dataclass(frozen=True)
class Attention(Meeting):
    """Causal softmax attention of queries, keys and values, (batch, time, d) each.

    Of one head: logits move by scale K (|dq| |k| + |q| |dk|) in RMS, and a mean under softmax odds
    by the largest move of a logit times the largest value, as a covariance is at most the product
    of standard deviations. Each head may look at another token, so over h heads what comes from
    keys and values is sqrt(h) times as large as one token allows (docs/theory.md).

    Attributes:
        heads: that share the vectors.
        width: of one head, K.
        scale: factor on products of queries and keys.
    """

    heads: int
    width: int
    scale: float

    def bound(self, xs: list[Size]) -> tuple[Size, tuple[Number, ...]]:
        """Bounds as above, in the largest RMS of a token."""
        q, k, v = xs
        spread = math.sqrt(self.heads)
        of_q, of_k, of_v = (self._head(x) for x in xs)
        steep = self.scale * self.width * of_v
        shares = (steep * of_k, steep * of_q * spread, spread)
        return Size(least(of_v, v.most), v.most, of_v), shares

    def _head(self, x: Size) -> Number:
        """The RMS of a head's share is at most this."""
        own = least(math.sqrt(self.heads) * x.rms, x.most)
        return own if x.head is None else least(own, x.head)

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Attend; in the dtype of the inputs."""
        q, k, v = (x.reshape(*x.shape[:-1], -1, self.width).transpose(1, 2) for x in xs)
        logits = q @ k.mT * self.scale
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        odds = logits.masked_fill(later, -torch.inf).softmax(-1)
        return (odds @ v).transpose(1, 2).flatten(-2)


@dataclass(frozen=True)
class Add(Meeting):
    """The sum, of sensitivity 1 to each part; so in the unit reading, too."""

    def bound(self, xs: list[Size]) -> tuple[Size, tuple[Number, ...]]:
        """Sums of bounds."""
        total, most = xs[0].rms, xs[0].most
        for x in xs[1:]:
            total, most = total + x.rms, most + x.most
        return Size(total, most), (1.0,) * len(xs)

    unit = bound

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Add."""
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total


@dataclass(frozen=True)
class Multiply(Meeting):
    """The product of two, entry by entry: the gate of an MLP."""

    def bound(self, xs: list[Size]) -> tuple[Size, tuple[Number, ...]]:
        """Each by the largest entry of the other."""
        a, b = xs
        return Size(least(a.rms * b.most, a.most * b.rms), a.most * b.most), (b.most, a.most)

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Multiply."""
        return xs[0] * xs[1]


def residual(branch: Node, share: float | None = None, name: str = "") -> Join:
    """X + branch(x), or with a share s (1 - s) x + s branch(x): of sensitivity 1 if the branch is.

    Source of the second: Large et al., arXiv 2405.14813.
    """
    if share is None:
        return Join((Scale(1.0), branch), Add(), name)
    return Join((Scale(1.0 - share), Series((branch, Scale(share)))), Add(), name)
