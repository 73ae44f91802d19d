"""Polar factors by matrix products alone, batched over equal shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geon.optim.polar.coefficients import POLAR_EXPRESS, TABLES, Coefficients
from geon.optim.polar.interval import steps_for
from geon.optim.polar.minimax import minimax
from geon.optim.polar.precision import Precision

# Frobenius normalisation leaves ||X||_2 <= 1; 1% above covers the rounding of a bf16 norm.
POLAR_MARGIN = 1.01


def unit_max(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide by the largest magnitude along `dim`; zeros stay zeros.

    Makes squares safe: entries of 1e-30 or 1e30 would leave the fp32 range when squared.
    """
    top = x.abs().amax(dim=dim, keepdim=True)
    return x / torch.where(top > 0, top, torch.ones_like(top))


def unit_frobenius(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Divide by the 2-norm along `dim` at any scale; zeros stay zeros."""
    x = unit_max(x, dim)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(norm > 0, norm, torch.ones_like(norm))


def product(a: Tensor, b: Tensor, precision: Precision | None = None) -> Tensor:
    """Return a @ b; precision None computes in the operands' dtype."""
    return a @ b if precision is None else precision.product(a, b)


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
    wide = matrix.shape[-2] < matrix.shape[-1]
    x = unit_frobenius(matrix) / POLAR_MARGIN
    x = x.mT if wide else x
    x = x if precision is None else precision.cast(x)
    for a, b, c in coefficients.steps(steps):
        gram = product(x.mT, x, precision)
        x = multiply_add(a, x, 1.0, x, even_part(gram, b, c, precision), precision)
    return (x.mT if wide else x).to(matrix.dtype)


def even_part(gram: Tensor, b: float, c: float, precision: Precision | None = None) -> Tensor:
    """Return b G + c G^2; a cubic step (c = 0) has no square to pay for."""
    return multiply_add(b, gram, c, gram, gram, precision) if c else b * gram


def multiply_add(
    beta: float,
    base: Tensor,
    alpha: float,
    a: Tensor,
    b: Tensor,
    precision: Precision | None = None,
) -> Tensor:
    """Return beta * base + alpha * a @ b, in one kernel.

    Rounds once, where the separate operations round three times: in bf16 this halves the error of
    a polar factor. All operands have the same leading dimensions.
    """
    if precision is Precision.BF16X3:
        return beta * base + alpha * product(a, b, precision)
    if precision is not None:
        base, a, b = precision.cast(base), precision.cast(a), precision.cast(b)
    if base.ndim == 2:
        return torch.addmm(base, a, b, beta=beta, alpha=alpha)
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (base, a, b))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view(base.shape)


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
        self.plan()  # a table that cannot reach the accuracy is refused here, not in training

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
        """Arithmetic on a device; None is the input's own dtype."""
        if self.precision is None and device.type != "cpu":
            return Precision.BF16
        return self.precision

    def __call__(self, matrix: Tensor) -> Tensor:
        """Polar factor of a batch (..., d_out, d_in)."""
        steps, table = self.plan()
        return polar(matrix, steps, table, self.precision_on(matrix.device))

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of one polar factor of this shape, every pass of bf16x3 counted."""
        short, long = min(shape), max(shape)
        steps, table = self.plan()
        squares = sum(c != 0 for _, _, c in table.steps(steps))
        passes = self.precision.passes if self.precision else 1
        return passes * (4 * steps * short * short * long + 2 * squares * short**3)
