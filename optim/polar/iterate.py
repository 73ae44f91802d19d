"""Polar factors by matrix products alone, batched over equal shapes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from geon.optim.polar.coefficients import POLAR_EXPRESS, TABLES, Coefficients

# Frobenius normalisation leaves ||X||_2 <= 1; 1% above covers the rounding of a bf16 norm.
_MARGIN = 1.01


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


def polar(
    matrix: Tensor,
    steps: int = 6,
    coefficients: Coefficients = POLAR_EXPRESS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Approximate U V^T of matrix = U S V^T, at any scale; zero in, zero out.

    Shapes: (..., d_out, d_in) -> same shape and dtype as the input.
    dtype: arithmetic of the products; None computes in the input's dtype.

    Source: Newton-Schulz form, K. Jordan (Muon); coefficients as named by the table.
    Cost: steps * (4 s^2 l + 2 s^3) FLOPs, s and l the short and long side.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    x = unit_frobenius(matrix) / _MARGIN
    x = (x.mT if wide else x).to(dtype or matrix.dtype)
    for a, b, c in coefficients.steps(steps):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
    return (x.mT if wide else x).to(matrix.dtype)


@dataclass(frozen=True)
class Polar:
    """How polar factors are computed: table, number of steps, dtype of the products.

    dtype None means: bf16 on an accelerator, the input's own dtype on a CPU.
    """

    coefficients: str = "polar_express"
    steps: int = 6
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.coefficients not in TABLES:
            raise ValueError(
                f"unknown polar coefficients '{self.coefficients}' (optim.polar.coefficients); "
                f"known: {', '.join(TABLES)}"
            )

    def __call__(self, matrix: Tensor) -> Tensor:
        """Polar factor of a batch (..., d_out, d_in)."""
        dtype = self.dtype
        if dtype is None and matrix.device.type != "cpu":
            dtype = torch.bfloat16
        return polar(matrix, self.steps, TABLES[self.coefficients], dtype)

    def flops(self, shape: tuple[int, int]) -> int:
        """FLOPs of one polar factor of this shape."""
        short, long = min(shape), max(shape)
        return self.steps * (4 * short * short * long + 2 * short**3)
