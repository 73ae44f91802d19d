"""The Gram form: polar factors and inverse square roots from n x n products."""

import torch
from torch import Tensor

from geon.optim.linalg import Precision, eye, ieee_products, product, sym, trace, unit_max
from geon.optim.polar.coefficients import POLAR_EXPRESS, Coefficients, Triple
from geon.optim.polar.iterate import POLAR_MARGIN, even_part

# Frobenius normalisation leaves ||R||_2 <= 1; 0.1% above covers the rounding of an fp32 norm.
_MARGIN = 1.001


def inverse_sqrt(
    gram: Tensor,
    steps: int = 7,
    coefficients: Coefficients = POLAR_EXPRESS,
    precision: Precision | None = None,
    ridge: float | None = None,
) -> Tensor:
    """Approximate gram^(-1/2) of symmetric positive (semi)definite matrices, at any scale.

    With p_k(x) = x f_k(x^2), the steps of `polar` on M give M F_1 F_2 ..., where F_k = f_k(R_k),
    R_1 = M^T M and R_(k+1) = F_k R_k F_k. All are polynomials in the Gram, so they commute and
    are symmetric, and M itself is not needed.

    The Gram is normalised by its own Frobenius norm, (sum sigma^4)^(1/2). Like the trace, sum
    sigma^2 (what `polar` divides by), it bounds the largest sigma^2; it is never above the trace
    and sqrt(n) times below on a flat spectrum, which saves about a step.

    Rounding leaves eigenvalues of R slightly below 0, and every step moves those away from 0, up
    to infinity. The ridge keeps them positive, and ||X||_2 near 1 / sqrt(ridge ||gram||_F) at most.

    Shapes: (..., n, n) -> same shape and dtype as the input.
    precision: arithmetic of the products, never TF32; None computes in the input's dtype.
    ridge: added to the eigenvalues, as a share of ||gram||_F. None takes the smallest that stays
        finite for any Gram and any steps: 2.4e-7 in fp32, 3.8e-6 in bf16x3, 4.4e-16 in fp64.

    Returns:
        X, symmetric. Once the steps suffice, ||X gram X - I||_2 is at most about k^2 sqrt(n)
        times the ridge, k the condition number of the root: at n = 256, 7e-9 in fp64 for k = 1e3
        and 4e-2 in fp32 for k = 1e2. With ridge 0 only rounding is left, a tenth of that in fp32,
        but a Gram with k above 1e3 (1e2 in bf16x3) may diverge. Zero in gives zero out.

    Raises:
        ValueError: bf16 arithmetic, or steps below 1 (optim.polar.steps).

    Source: Newton-Schulz on the Gram, as in Amsel et al., arXiv 2505.16932.
    Cost: 2 n^3 FLOPs a product; 3 products in the first step, 2 in the last, 4 in the others, one
        less in each cubic step.
    """
    _refuse_bf16(gram, precision)
    top = gram.abs().amax(dim=(-2, -1), keepdim=True)
    r = unit_max(gram, (-2, -1))
    norm = _MARGIN * torch.linalg.vector_norm(r, dim=(-2, -1), keepdim=True)
    # Roots first: top * norm may leave the range of the dtype. 0 for a zero Gram, instead of inf.
    scale = torch.where(top > 0, top.rsqrt() * norm.rsqrt(), torch.zeros_like(top))
    r = r / torch.where(norm > 0, norm, torch.ones_like(norm))
    r = r if precision is None else precision.cast(r)
    shift = _stable_ridge(r.dtype, precision) if ridge is None else ridge
    with ieee_products():
        root = _inverse_root(r + shift * eye(r), coefficients.steps(steps), precision)
    return (scale * root).to(gram.dtype)


def polar_root(
    gram: Tensor, steps: int, coefficients: Coefficients, precision: Precision | None = None
) -> Tensor:
    """Q with M Q = `polar(M, steps, coefficients)`, from gram = M^T M alone.

    Unlike `inverse_sqrt` it divides by the trace, as `polar` divides by the Frobenius norm, so a
    table that does not converge gives the same singular values. A scale of M must be divided out
    before: the trace is taken as it is. Zero in, zero out.

    Shapes: (..., n, n), symmetric. Raises, Source: as `inverse_sqrt`.
    Cost: 2 n^3 FLOPs a product; 4 products a step at most, and four Cholesky factors.
    """
    _refuse_bf16(gram, precision)
    total = trace(gram)
    norm = torch.where(total > 0, total, torch.ones_like(total)).sqrt() * POLAR_MARGIN
    r = gram / norm**2
    r = r + _least_ridge(r, _stable_ridge(r.dtype, precision)) * eye(r)
    root = _inverse_root(r, coefficients.steps(steps), precision)
    return torch.where(total > 0, root / norm, torch.zeros_like(root))


def _least_ridge(r: Tensor, stable: float) -> Tensor:
    """The least of 0, 1/16, 1/4, 1/2 and 1 times `stable` with which r has a Cholesky factor.

    A factor in rounded arithmetic shows that no eigenvalue is far enough below 0 to be moved to
    infinity. Well-conditioned Grams need no ridge, and it would cost them digits: with it, descent
    differs from that of `polar` by 2e-4, without it by 2e-6 (fp32, 192 x 192,
    columns that decay over three decades).
    """
    ridge = torch.full_like(r[..., :1, :1], stable)
    for share in (0.5, 0.25, 0.0625, 0.0):
        found = torch.linalg.cholesky_ex(r + share * stable * eye(r)).info == 0
        ridge = torch.where(found[..., None, None], share * stable, ridge)
    return ridge


def _inverse_root(r: Tensor, triples: list[Triple], precision: Precision | None) -> Tensor:
    """Product of the F_k, made symmetric after each: rounding would drift and then grow."""
    root = r
    for i, (a, b, c) in enumerate(triples):
        f = a * eye(r) + even_part(r, b, c, precision)
        root = sym(product(root, f, precision) if i else f)
        if i < len(triples) - 1:
            r = sym(product(f, product(r, f, precision), precision))
    return root


def _stable_ridge(dtype: torch.dtype, precision: Precision | None) -> float:
    """Two times what kept low rank and spikes finite, n to 1024: products err by 4e-6 or eps."""
    return 2.0**-18 if precision is Precision.BF16X3 else 2 * torch.finfo(dtype).eps


def _refuse_bf16(x: Tensor, precision: Precision | None) -> None:
    half = precision is None and x.dtype in (torch.bfloat16, torch.float16)
    if half or precision is Precision.BF16:
        raise ValueError(
            f"the Gram form squares the condition number and diverges in "
            f"{x.dtype if half else precision}: use fp32 or bf16x3 (optim.polar.dtype), "
            "or polar(), which works on the matrix itself"
        )
