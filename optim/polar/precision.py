"""Arithmetic of matrix products: fp32, bf16, and fp32 made of three bf16 products."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Tensor


class Precision(StrEnum):
    """How a product rounds; values are the words of optim.polar.dtype.

    Relative error of a product of Gaussian matrices, in Frobenius norm: fp32 2e-7, bf16 3e-3,
    bf16x3 4e-6 at three times the arithmetic of bf16.

    fp32 follows the global TF32 setting on CUDA; see `ieee_products`.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    BF16X3 = "bf16x3"

    @property
    def passes(self) -> int:
        """Hardware products per product."""
        return 3 if self is Precision.BF16X3 else 1

    def cast(self, x: Tensor) -> Tensor:
        """Return x as operands are stored: bf16 in bfloat16, others in fp32, or fp64 if x is."""
        if self is Precision.BF16:
            return x.bfloat16()
        return x if x.dtype in (torch.float32, torch.float64) else x.float()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b in this arithmetic, operands cast first.

        Shapes: (..., m, k), (..., k, n) -> (..., m, n), in the dtype of `cast`.

        Source (bf16x3): G. Henry, P. Tang, A. Heinecke, arXiv 1904.06376: x = hi + lo keeps 16
            bits of x; of the four products, lo @ lo is below what fp32 accumulation keeps.
        Cost: `passes` products.
        """
        a, b = self.cast(a), self.cast(b)
        if self is not Precision.BF16X3:
            return a @ b
        (a_hi, a_lo), (b_hi, b_lo) = _split(a), _split(b)
        small = _widened_product(a_hi, b_lo, a.dtype) + _widened_product(a_lo, b_hi, a.dtype)
        return small + _widened_product(a_hi, b_hi, a.dtype)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return hi + lo = x up to 2^-17 of x, both bfloat16."""
    hi = x.bfloat16()
    return hi, (x - hi.to(x.dtype)).bfloat16()


def _widened_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Product of bf16 matrices, accumulated and returned in fp32 or wider.

    A CPU rounds the result of a bf16 product to bf16. Widened operands give the same numbers as
    tensor cores: products of two bf16 numbers are exact in fp32.
    """
    if not a.is_cuda:
        return a.to(dtype) @ b.to(dtype)
    if a.ndim == b.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32).to(dtype)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    out = torch.bmm(a, b, out_dtype=torch.float32).to(dtype)
    return out.reshape(*batch, *out.shape[-2:])


@contextmanager
def ieee_products() -> Iterator[None]:
    """Make fp32 products on CUDA round as IEEE fp32 inside, whatever the program set outside.

    TF32 keeps 10 bits: a TF32 Gram of a weight on the Stiefel manifold loses the manifold (drift
    of W'W - I of 1.6e-4 after 1,500 steps, 1.4e-6 in fp32), and its error, amplified by the
    condition number, makes inverse roots and geometric means blow up.

    The previous setting comes back on the way out, also after an exception. Does nothing on a
    build without CUDA. The setting is global to the process, not to the thread.
    """
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        yield
        return
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision  # the older allow_tf32 cannot be read once this one is set
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
