"""Attempts to break a certificate: random pairs of inputs, and ascent on the Jacobian."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.modular.nodes import (
    Atom,
    Join,
    Network,
    Number,
    Reading,
    Series,
    Trace,
    Values,
    WeightSize,
    rms,
)

SLACK = 1.0 + 1e-6
"""A ratio above this is a violation: differences of fp64 outputs keep 7 digits at least here."""


@dataclass(frozen=True)
class Found:
    """What a search found: largest ratios of what was measured to its bound.

    Attributes:
        tried: pairs, or searches.
        sensitivity: of the whole network.
        node: of the sensitivity of a node by itself, where that was looked at.
        size: of an activation.
    """

    tried: int
    sensitivity: float
    node: float = 0.0
    size: float = 0.0

    @property
    def violated(self) -> bool:
        """Whether a bound does not hold."""
        return not max(self.sensitivity, self.node, self.size) <= SLACK


class Search:
    """A network with fp64 weights, whose first activation is varied within its bounds.

    What enters each RMSNorm is observed for every pair, and the certificate of just that
    pair is held against it: the condition of a bound is always met.
    """

    def __init__(
        self,
        network: Network,
        params: Mapping[str, Tensor],
        sizes: Mapping[Atom, WeightSize],
        time: int,
        generator: Generator,
    ) -> None:
        """time: tokens of an input. params: whole weights by name."""
        self.network, self.sizes, self.time, self.generator = network, sizes, time, generator
        self._weights = {
            atom: atom.take(params[atom.param].detach().double()) for atom in network.places()
        }
        source, _ = network.trace(Reading(sizes))
        self._most = float(source.out.rms), float(source.out.most)
        first = network.source.atoms()
        self._rows, self._width = next(first).shape  # type: ignore[attr-defined]

    @torch.no_grad()
    def pairs(self, count: int, chunk: int = 64) -> Found:
        """Hold random pairs, and every node on their way, against their certificates."""
        worst = [0.0, 0.0, 0.0]
        for start in range(0, count, chunk):
            x, y = self._draw_pairs(min(chunk, count - start))
            values, ratios = self._values(True), _Ratios()
            for one in (x, y):
                self.network.body.forward(one, values)
            _, body = self.network.trace(Reading(self.sizes, values.smallest))
            fx, fy = ratios.follow(body, x, y, self._values(False))
            ratio = _ratio(_size(fx - fy), body.lipschitz * _size(x - y))
            worst = [
                max(pair) for pair in zip(worst, (ratio, ratios.node, ratios.size), strict=True)
            ]
        return Found(count, *worst)

    def ascend(self, count: int, steps: int = 20, chunk: int = 16) -> Found:
        """Ascend the ratio |J v| / |v| over inputs x and directions v, from `count` random starts.

        Steps are half as long as x and less; x is kept within its bounds.
        """
        worst = 0.0
        for start in range(0, count, chunk):
            x, _ = self._draw_pairs(min(chunk, count - start))
            v = self._normal(tuple(x.shape))
            for step in range(steps):
                worst = max(worst, self._slope_ratio(x, v))
                x, v = self._climb(x, v, 0.5 / (1 + step))
            worst = max(worst, self._slope_ratio(x, v))
        return Found(count, worst)

    def _slope(self, x: Tensor, v: Tensor) -> Tensor:
        values = self._values(False)
        moved = torch.func.jvp(lambda at: self.network.body.forward(at, values), (x,), (v,))[1]
        return _size(moved) / _size(v)

    def _climb(self, x: Tensor, v: Tensor, step: float) -> tuple[Tensor, Tensor]:
        climb = torch.func.grad(
            lambda a, b: self._slope(a, b).clamp_min(1e-300).log().sum(), (0, 1)
        )
        by_x, by_v = climb(x, v)
        v = v / _size(v)[:, None, None]
        return self._within(x + step * _like(by_x, x)), v + 2.0 * step * _like(by_v, v)

    @torch.no_grad()
    def _slope_ratio(self, x: Tensor, v: Tensor) -> float:
        values = self._values(True)
        self.network.body.forward(x, values)
        _, body = self.network.trace(Reading(self.sizes, values.smallest))
        return _ratio(self._slope(x, v), body.lipschitz)

    def _values(self, noting: bool) -> Values:
        return Values(self._weights.__getitem__, noting=noting)

    # Inputs.

    def _draw_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Half of them activations of tokens, half free; half far apart, half close."""
        x, y = self._draw(count), self._draw(count)
        close = self._within(x + 10.0 ** (-1 - 4 * self._uniform(count)) * _like(y, x))
        near = torch.arange(count) % 4 < 2
        return x, torch.where(near[:, None, None], close, y)

    def _draw(self, count: int) -> Tensor:
        tokens = torch.randint(0, self._rows, (count, self.time), generator=self.generator)
        looked = self.network.source.forward(tokens, self._values(False))
        free = self._normal((count, self.time, self._width))
        # Powers concentrate a vector on few entries, where the bounds of squares are reached.
        free = free.sign() * free.abs() ** (1 + 7 * self._uniform(count))
        free = self._within(free * 1e30, shrink=True)  # as large as the bounds allow, or less
        is_free = torch.arange(count) % 2 == 0
        return torch.where(is_free[:, None, None], free, looked)

    def _within(self, x: Tensor, shrink: bool = False) -> Tensor:
        """Scale tokens down that are above the bounds of the first activation."""
        size, most = self._most
        over = torch.maximum(rms(x) / size, x.abs().amax(-1) / most).clamp_min(1.0)
        x = x / over[..., None]
        return x * self._uniform(len(x)) ** 2 if shrink else x

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand((count, 1, 1), generator=self.generator, dtype=torch.float64)


def _size(x: Tensor) -> Tensor:
    """Largest RMS of a token, of each input (batch, time, d)."""
    return rms(x).amax(-1)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """Direction x at the size of another, each of the batch."""
    return x * (_size(other) / _size(x).clamp_min(1e-300))[:, None, None]


def _ratio(measured: Tensor, bound: Number) -> float:
    """Largest ratio. 0 of 0 is 0; what is no number holds no bound, so its ratio is infinite."""
    ratios = torch.where(measured == 0, 0.0, measured / bound)
    return float(ratios.nan_to_num(torch.inf, torch.inf).max())


class _Ratios:
    """Largest ratios of a pair of inputs that goes through a network node by node."""

    def __init__(self) -> None:
        self.node = self.size = 0.0

    def follow(self, trace: Trace, x: Tensor, y: Tensor, values: Values) -> tuple[Tensor, Tensor]:
        """Apply a node to both inputs, its parts one by one; note how near each comes to bounds."""
        node = trace.node
        if isinstance(node, Series):
            for part in trace.parts:
                x, y = self.follow(part, x, y, values)
            return x, y
        if isinstance(node, Join):
            ends = [self.follow(part, x, y, values) for part in trace.parts]
            fx, fy = (node.bond.forward([pair[i] for pair in ends]) for i in (0, 1))
            moves = zip(trace.shares, ends, strict=True)
            allowed: Number = sum(share * _size(a - b) for share, (a, b) in moves)
        else:
            fx, fy = node.forward(x, values), node.forward(y, values)
            allowed = trace.lipschitz * _size(x - y)
        self.node = max(self.node, _ratio(_size(fx - fy), allowed))
        for out in (fx, fy):
            sizes = (_size(out), trace.out.rms), (out.flatten(1).abs().amax(1), trace.out.most)
            self.size = max(self.size, *(_ratio(*pair) for pair in sizes))
        return fx, fy
