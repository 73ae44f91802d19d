"""Atoms: modules with one weight, the norm in which it steps, and certified bounds of it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from geon.optim.modular.nodes import Atom, Number, Reading, Size, Trace, Values, WeightSize, least
from geon.optim.modular.sizes import largest_row, spectral_bound


@dataclass(frozen=True)
class Linear(Atom):
    """A matrix (d_out, d_in), in the RMS -> RMS norm, or a head in that of signs.

    Attributes:
        param: name of the parameter.
        shape: (d_out, d_in) of the matrix.
        part: number of the matrix among those that share the parameter's rows.
        parts: how many share them, equally.
        norm: spectral or sign; d_in max|W_ij| is never below the RMS -> RMS norm.
        own_mass: mass.
    """

    param: str
    shape: tuple[int, int]
    part: int = 0
    parts: int = 1
    norm: str = "spectral"
    own_mass: float = 1.0

    def trace(self, x: Size, reading: Reading) -> Trace:
        """The norm of the weight is the sensitivity."""
        if reading.weights is None:
            return Trace(self, x, Size(x.rms, x.rms), 1.0)
        size = reading.weights[self]
        rms = size.gain * x.rms
        most = least(size.most * math.sqrt(self.shape[1]) * x.rms, math.sqrt(self.shape[0]) * rms)
        return Trace(self, x, Size(rms, most), size.gain)

    def change(self, into: Size) -> Number:
        """Size of the input."""
        return into.rms

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Multiply by the matrix."""
        return F.linear(x, values.weight(self))

    def measure(self, value: Tensor) -> WeightSize:
        """RMS -> RMS norm, and the 2-norm of the largest row."""
        ratio = math.sqrt(self.shape[1] / self.shape[0])
        return WeightSize(ratio * spectral_bound(value), largest_row(value))


@dataclass(frozen=True)
class Embed(Atom):
    """A table (count, d) of tokens, or of positions, in the norm of its largest row.

    Attributes:
        norm: colnorm; sign where the table is the head as well.
        positions: whether rows are looked up by position.
    """

    param: str
    shape: tuple[int, int]
    norm: str = "colnorm"
    own_mass: float = 1.0
    positions: bool = False

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Bounds of a row. Its sensitivity is counted from the row on."""
        if reading.weights is None:
            return Trace(self, x, Size(1.0, 1.0), 1.0)
        size = reading.weights[self]
        return Trace(self, x, Size(size.gain, size.most), 1.0)

    def change(self, into: Size) -> Number:
        """1 in colnorm; a row whose entries are w at most has d w in the norm of signs."""
        return 1.0 if self.norm == "colnorm" else 1.0 / self.shape[1]

    def forward(self, x: Any, values: Values) -> Tensor:
        """Look up tokens (batch, time), or their positions."""
        table = values.weight(self)
        return table[torch.arange(x.shape[1], device=x.device)] if self.positions else table[x]

    def measure(self, value: Tensor) -> WeightSize:
        """Largest RMS of a row, and largest magnitude."""
        return WeightSize(largest_row(value) / math.sqrt(self.shape[1]), _most(value))


@dataclass(frozen=True)
class Gain(Atom):
    """A factor for each entry, in the norm of its largest."""

    param: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    norm: str = "sign"
    own_mass: float = 1.0

    def trace(self, x: Size, reading: Reading) -> Trace:
        """The largest magnitude is the sensitivity."""
        if reading.weights is None:
            return Trace(self, x, x, 1.0)
        most = reading.weights[self].gain
        return Trace(self, x, x.scaled(most), most)

    def change(self, into: Size) -> Number:
        """Size of the input; the norm of signs of a row of n is n times its largest entry."""
        return into.rms / self.shape[-1]

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Multiply by the gains."""
        return x * values.weight(self)

    def measure(self, value: Tensor) -> WeightSize:
        """Largest magnitude."""
        return WeightSize(_most(value), _most(value))


@dataclass(frozen=True)
class Bias(Atom):
    """A vector that is added, in the RMS norm."""

    param: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1
    norm: str = "rms"
    own_mass: float = 1.0

    def trace(self, x: Size, reading: Reading) -> Trace:
        """Sizes add; in the unit reading it starts at 0, as biases do."""
        if reading.weights is None:
            return Trace(self, x, x, 1.0)
        size = reading.weights[self]
        return Trace(self, x, Size(x.rms + size.gain, x.most + size.most), 1.0)

    def change(self, into: Size) -> Number:
        """A change is added."""
        return 1.0

    def forward(self, x: Tensor, values: Values) -> Tensor:
        """Add the bias."""
        return x + values.weight(self)

    def measure(self, value: Tensor) -> WeightSize:
        """RMS and largest magnitude."""
        size = float(value.detach().double().square().mean().sqrt())
        return WeightSize(size * (1.0 + 1e-12), _most(value))


def _most(value: Tensor) -> float:
    return float(value.detach().double().abs().max())
