"""Polar factors by matrix products alone, batched over equal shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geon.optim.costs import Cost, products
from geon.optim.linalg import (
    Precision,
    multiply_add,
    product,
    unit_frobenius,
    unit_scaled,
)
from geon.optim.polar.coefficients import POLAR_EXPRESS, TABLES, Coefficients, Triple
from geon.optim.polar.interval import steps_for
from geon.optim.polar.minimax import minimax

# Frobenius normalisation leaves ||X||_2 <= 1; 1% above covers the rounding of a bf16 norm.
POLAR_MARGIN = 1.01


def polar(
    matrix: Tensor,
    steps: int = 6,
    coefficients: Coefficients = POLAR_EXPRESS,
    precision: Precision | None = None,
) -> Tensor:
    """Approximate U V^T of matrix = U S V^T, at any scale; zero in, zero out.

    Shapes: (..., d_out, d_in) -> same shape and dtype as the input.
    precision: arithmetic of the products; None computes in the input's dtype.

    Raises:
        ValueError: steps below 1 (optim.polar.steps).

    Source: Newton-Schulz form, K. Jordan (Muon); coefficients as named by the table.
    Cost: steps * (4 s^2 l + 2 s^3) FLOPs, s and l the short and long side; a cubic step 4 s^2 l.
    """
    return _iterate(unit_frobenius(matrix), coefficients.steps(steps), precision)


def polar_of_bounded(
    matrix: Tensor, lower: float, upper: float, precision: Precision | None = None
) -> Tensor:
    """Polar factor of matrices whose singular values lie in [lower, upper], to 1e-3.

    Takes as many steps as that needs; ratios below 1e-6 are taken as 1e-6, which fp32 resolves.
    Tables are made for powers of 2, so that rates of a schedule share them.

    Shapes: (..., d_out, d_in) -> same.
    """
    ratio = max(lower / upper / POLAR_MARGIN, 1e-6)
    ratio = 0.5 ** math.ceil(-math.log2(ratio))
    triples = minimax(ratio, steps_for(1e-3, ratio)).steps(steps_for(1e-3, ratio))
    return _iterate(matrix / upper, triples, precision)


def _iterate(unit: Tensor, triples: Sequence[Triple], precision: Precision | None) -> Tensor:
    """Polar steps on matrices of Frobenius norm 1 at most; the margin is in the first step."""
    wide = unit.shape[-2] < unit.shape[-1]
    x = unit.mT if wide else unit
    x = x if precision is None else precision.cast(x)
    margin = POLAR_MARGIN
    for a, b, c in triples:
        a, b, c = a / margin, b / margin**3, c / margin**5
        gram = product(x.mT, x, precision)
        x = multiply_add(a, x, 1.0, x, even_part(gram, b, c, precision), precision)
        margin = 1.0
    return (x.mT if wide else x).to(unit.dtype)


def even_part(gram: Tensor, b: float, c: float, precision: Precision | None = None) -> Tensor:
    """Return b G + c G^2; a cubic step (c = 0) has no square to pay for."""
    return multiply_add(b, gram, c, gram, gram, precision) if c else b * gram


@dataclass(frozen=True)
class Polar:
    """How polar factors are computed.

    Attributes:
        coefficients: name of the table: polar_express, keller, cubic.
        steps: number of steps; not read when accuracy is above 0.
        precision: arithmetic of the products. None means bf16 on an accelerator and the input's
            own dtype on a CPU.
        accuracy: above 0, take the fewest steps that bring singular values within this of 1, in
            exact arithmetic (bf16 stops at about 6e-3). The table polar_express is then computed
            for `lower` instead of the published 1e-3.
        lower: smallest singular value that has to arrive, as a share of the Frobenius norm.
    """

    coefficients: str = "polar_express"
    steps: int = 6
    precision: Precision | None = None
    accuracy: float = 0.0
    lower: float = 1e-3
    _triples: tuple[Triple, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.coefficients not in TABLES:
            raise ValueError(
                f"unknown polar coefficients '{self.coefficients}' (optim.polar.coefficients); "
                f"known: {', '.join(TABLES)}"
            )
        if not 0 <= self.accuracy < float("inf"):
            raise ValueError(
                f"polar accuracy must be 0 or more, got {self.accuracy} (optim.polar.accuracy)"
            )
        if not 0 < self.lower < 1:
            raise ValueError(
                f"polar lower must be between 0 and 1, ends excluded, got {self.lower} "
                "(optim.polar.lower)"
            )
        # A table that cannot reach the accuracy is refused here, not in training.
        steps, table = self.plan()
        object.__setattr__(self, "_triples", tuple(table.steps(steps)))

    def plan(self) -> tuple[int, Coefficients]:
        """Return the number of steps and the table they come from."""
        table = TABLES[self.coefficients]
        if self.accuracy == 0:
            return self.steps, table
        lower = self.lower / POLAR_MARGIN  # the norm is divided out with this margin
        if table is not POLAR_EXPRESS:
            return steps_for(self.accuracy, lower, table), table
        steps = steps_for(self.accuracy, lower)
        return steps, minimax(lower, steps)

    def precision_on(self, device: torch.device) -> Precision | None:
        """Arithmetic of the products on a device; None is the input's own dtype."""
        if self.precision is None and device.type != "cpu":
            return Precision.BF16
        return self.precision

    def __call__(self, matrix: Tensor) -> Tensor:
        """Polar factor of a batch (..., d_out, d_in)."""
        precision = self.precision_on(matrix.device)
        return _iterate(unit_frobenius(matrix), self._triples, precision)

    def of_scaled(self, matrix: Tensor) -> Tensor:
        """Polar factor of a batch of matrices that are known to be about 1 in size."""
        precision = self.precision_on(matrix.device)
        return _iterate(unit_scaled(matrix), self._triples, precision)

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of one polar factor of this shape on a kind of device.

        Beside the products: the largest entry and the norm, two divisions, and two casts.
        """
        short, long = min(shape), max(shape)
        steps, table = self.plan()
        squares = sum(c != 0 for _, _, c in table.steps(steps))
        precision = self.precision_on(torch.device(device)) or Precision.FP32
        cast = precision is Precision.BF16
        return products(
            4 * steps * short * short * long + 2 * squares * short**3,
            precision.value,
            words=(11 if cast else 8) * short * long,
            operators=3 * steps + (9 if cast else 7),
        )

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of one polar factor of this shape, every pass of bf16x3 counted."""
        return self.cost(shape).flops
