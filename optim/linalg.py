"""Linear algebra of batches (..., rows, cols): products in a chosen arithmetic, norms, parts.

Nothing here knows of norms, manifolds or ranks, and nothing waits for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

import torch
from torch import Generator, Tensor


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
        """Number of hardware products that one product takes."""
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
        Cost: `passes` products, in one kernel; three copies in bf16 of each operand.
        """
        a, b = self.cast(a), self.cast(b)
        if self is not Precision.BF16X3:
            return a @ b
        # One product of three times the length: hi hi + hi lo + lo hi is summed in the accumulator.
        return _widened_product(_split(a, -1, low=2), _split(b, -2, low=1), a.dtype)


def product(a: Tensor, b: Tensor, precision: Precision | None = None) -> Tensor:
    """Return a @ b; precision None computes in the operands' dtype."""
    return a @ b if precision is None else precision.product(a, b)


def accurate_on(device: torch.device) -> Precision | None:
    """Cheapest arithmetic with about the digits of fp32 on a device; None is the operands' dtype.

    An H100 takes fp32 products at 50 TFLOP/s, bf16 ones at 600, so bf16x3 at 200.
    """
    return None if device.type == "cpu" else Precision.BF16X3


def rough_product(a: Tensor, b: Tensor, precision: Precision | None = None) -> Tensor:
    """Return a @ b, off by 3e-3, where `precision` is bf16x3; as `product` otherwise.

    One bf16 product, returned as wide as bf16x3: for what only steers a solver, and for small
    corrections, next to products that need their digits.
    """
    if precision is not Precision.BF16X3:
        return product(a, b, precision)
    return _widened_product(a.bfloat16(), b.bfloat16(), precision.cast(a).dtype)


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
    a polar factor. In bf16x3 it takes three kernels. All operands have the same leading dimensions.
    """
    if precision is Precision.BF16X3:
        return product(a, b, precision).mul_(alpha).add_(precision.cast(base), alpha=beta)
    if precision is not None:
        base, a, b = precision.cast(base), precision.cast(a), precision.cast(b)
    if base.ndim == 2:
        return torch.addmm(base, a, b, beta=beta, alpha=alpha)
    if base.ndim == 3:
        return torch.baddbmm(base, a, b, beta=beta, alpha=alpha)
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (base, a, b))
    return torch.baddbmm(*flat, beta=beta, alpha=alpha).view(base.shape)


def _split(x: Tensor, dim: int, low: int) -> Tensor:
    """Copy x to bf16 three times along `dim`: twice hi, and as number `low` lo; x = hi + lo.

    hi + lo is x up to 2^-17 of x. What is stored by columns stays so: products read both.
    """
    if x.stride(-1) != 1 and x.stride(-2) == 1:
        return _split(x.mT, -3 - dim, low).mT
    if torch.compiler.is_compiling():  # which makes one kernel of it
        hi = x.bfloat16()
        parts = [hi, hi]
        parts.insert(low, (x - hi.to(x.dtype)).bfloat16())
        return torch.cat(parts, dim)
    sizes = list(x.shape)
    sizes[dim] *= 3
    copies = torch.empty(sizes, dtype=torch.bfloat16, device=x.device)
    parts = list(copies.chunk(3, dim))
    rest, hi = parts.pop(low), parts[0]
    hi.copy_(x)
    torch.sub(x, hi, out=rest)  # rounds to bf16 as it writes
    parts[1].copy_(hi)
    return copies


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


def unit_max(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Divide x by its largest magnitude along `dim`; zeros stay zeros.

    Makes squares safe: entries of 1e-30 or 1e30 would leave the fp32 range when squared.
    """
    top = x.abs().amax(dim=dim, keepdim=True)  # the inf norm takes 15 times as long on a CPU
    return x / top.clamp_min(torch.finfo(x.dtype).tiny)


def unit_frobenius(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Divide x by its 2-norm along `dim`, at any scale; zeros stay zeros."""
    return unit_scaled(unit_max(x, dim), dim)


def unit_scaled(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """`unit_frobenius` of what is known to be about 1 in size: squares stay in range."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / norm.clamp_min(torch.finfo(x.dtype).tiny)


def frobenius(x: Tensor) -> Tensor:
    """||X||_F of each matrix of a batch, as (..., 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<A, B> of each matrix of a batch, as (..., 1, 1)."""
    return (a * b).sum(dim=(-2, -1), keepdim=True)


def trace(x: Tensor) -> Tensor:
    """Trace of square matrices, as (..., 1, 1)."""
    return x.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]


def eye(like: Tensor) -> Tensor:
    """Identity matrix of the size, dtype and device of square matrices."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def sym(x: Tensor) -> Tensor:
    """Symmetric part of square matrices."""
    return 0.5 * (x + x.mT)


def skew(x: Tensor) -> Tensor:
    """Skew part of square matrices."""
    return 0.5 * (x - x.mT)


def orient(x: Tensor) -> Tensor:
    """Transpose wide matrices, so that the long side comes first."""
    return x.mT if x.shape[-2] < x.shape[-1] else x


def orient_like(x: Tensor, like: Tensor) -> Tensor:
    """Undo `orient` for a tensor that belongs to `like`."""
    return x.mT if like.shape[-2] < like.shape[-1] else x


def gaussian(shape: tuple[int, int], generator: Generator) -> Tensor:
    """Standard normal matrix, drawn on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
