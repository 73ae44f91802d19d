"""LGM: Manifold Muon's direction by a Lyapunov equation and a matrix geometric mean.

Maximise <G, A> over ||A||_2 <= 1 with U^T A skew, for tall U, U^T U = I. Write A = U Z + P X with
Z skew and P = (I - U U^T) G, the part of G across U. With K = skew(U^T G) and C = P^T P, all the
work is n x n:

1. Q = (K^T K + C)^(1/2), the root of the dual's Gram where the dual ascent would start.
2. Z solves ZQ + QZ = 2K; then ||Z||_2 <= 1, because Q >= |K|. It is mixed with Z' = skew(K Q^-1),
   a contraction too, by a share that depends on the aspect ratio.
3. X = C^-1 # (I + Z^2), the geometric mean: the best A for this Z; it has A^T A = I.

Derived, with proofs, in docs/theory.md. Two forms: `gram` takes the Grams U^T G and G^T G to
coefficients; it squares condition numbers, so it needs fp32 or bf16x3. `rectangular` takes two
polar factors of long matrices instead, which may be in bf16.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geon.optim.linalg import (
    Precision,
    eye,
    inner,
    product,
    rough_product,
    skew,
    sym,
    trace,
    unit_frobenius,
)
from geon.optim.polar import Polar, inverse_sqrt, minimax
from geon.optim.solvers.base import Solution

# Measured choices: benches/solver.py --ablate shows what each is worth. Lengths are in units
# of the root mean square singular value of the tangent part of the gradient.
SHIFT = 0.02
"""Dual singular values are smoothed to (s^2 + SHIFT^2)^(1/2)."""
SOFT = 2e-5
"""Added to the Gram across U, as a share of its mean: smaller ones are lost to fp32 rounding."""
JITTER = 5e-4
"""Added to I + Z^2 before its Cholesky factor; the direction's norm becomes sqrt(1 + JITTER)."""
OVER_RELAXATION = 1.3
"""Factor on the step of a refinement."""
CG_STEPS = 5
"""Conjugate gradient steps on the Lyapunov equation, from Z'."""
ROOT_STEPS = 6
ROOT_TABLE = minimax(3e-3, ROOT_STEPS)
POWER_STEPS = 12
ENERGY = 1.02
"""Largest admitted ||A||_F^2 / n; in exact arithmetic it is 1 at most."""

# Polar factors are off by 1%, in fp32 too after six steps, so the guards of Z are wider.
ROUGH_JITTER = 2e-3
ROUGH_MARGIN = 1.01


def gram(u: Tensor, grad: Tensor, refine: int = 0, precision: Precision | None = None) -> Solution:
    """LGM direction from n x n products.

    Shapes: u and grad (..., long, short), u^T u = I.
    refine: steps of reweighted least squares on the dual before the completion (docs/theory.md).
    precision: fp32 or bf16x3; None computes in the dtype of `grad`. On CUDA keep TF32 off around
        it (`ieee_products`).

    Returns: directions, tangent to rounding, of spectral norm (1 + JITTER)^(1/2), scale invariant,
        exactly zero for zero. Where rounding broke the completion it is the one-shot step, and
        `fell_back` says so.
    Source: docs/theory.md; we know of no earlier description.
    Cost: 7 r + 61 + 31 refine products of n x n, r = long/short (`gram_products`).
    """
    n = u.shape[-1]
    g = unit_frobenius(grad) * math.sqrt(n)
    b, gg = product(u.mT, g, precision), product(g.mT, g, precision)
    uu = product(u.mT, u, precision)
    left, right, fell_back = coefficients(b, gg, uu, u.shape[-2] / n, refine, precision)
    a = product(u, left, precision) + product(g, right, precision)
    # Where C is small, X is large, and so is the rounding of G X - U (B X): make A tangent again.
    return Solution(a - product(u, sym(product(u.mT, a, precision)), precision), fell_back)


def gram_products(ratio: float, refine: int = 0) -> float:
    """Products of n x n (2 n^3 FLOPs each) that `gram` takes for aspect ratio long/short.

    A Cholesky factor counts 1/6; symmetric products count in full.
    """
    root = 4 * ROOT_STEPS - 3
    lyapunov_solve = 2 + CG_STEPS
    along = (1 + refine) * (2 + root) + refine * (1 + lyapunov_solve)
    along += lyapunov_solve if share(ratio) < 1.0 else 0
    across = 1 + 1 / 6 + 2 + root + 2 + 1
    return 7 * ratio + 3 + along + across + 1


def coefficients(
    b: Tensor,
    gg: Tensor,
    uu: Tensor,
    ratio: float,
    refine: int = 0,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(L1, L2, fell back) with A = U L1 + G L2, from U^T G, G^T G and U^T U alone.

    Nothing here is longer than n: on ranks that cut the long side, the two Grams are all that has
    to be summed.

    Shapes: (..., n, n); G has Frobenius norm sqrt(n), or 0. ratio: long/short.
    """
    k = skew(b)
    # C = P^T P of P = G - U B, for any U: with U^T U taken as I, a defect of 1e-4 of a weight that
    # is nearly square, or 4e-3 of one in bf16, made C indefinite, and the direction unbounded.
    inside = product(b.mT, b, precision)
    c = sym(gg - 2 * inside + product(b.mT, product(uu, b, precision), precision))
    noise = _noise(inside, precision)
    size = ((trace(c) + inner(k, k)) / b.shape[-1]).maximum(noise).sqrt()
    k, c, noise = k / size, c / size**2, noise / size**2
    along = _along(k, c, noise, ratio, refine, precision)
    x, broken = _across(along.z, c, noise, precision)
    # The one-shot step is at hand: Z' along U, Q^-1 across.
    z = along.one_shot.where(broken, along.z)
    x = along.root_inverse.where(broken, x) / size
    return z - product(b, x, precision), x, broken[..., 0, 0]


class _Along(NamedTuple):
    """The part along U, and the one-shot step (skew(K Q^-1), Q^-1) of the first root."""

    z: Tensor
    one_shot: Tensor
    root_inverse: Tensor


def _along(
    k: Tensor, c: Tensor, noise: Tensor, ratio: float, refine: int, precision: Precision | None
) -> _Along:
    shift = (SHIFT**2 + noise) * eye(k)
    s, z, roots = torch.zeros_like(k), torch.zeros_like(k), []
    for step in range(refine + 1):
        m = k + s
        r = sym(product(m.mT, m, precision)) + c + shift
        inverse = _inverse_root(r, precision)
        one_shot = skew(product(m, inverse, precision))
        roots.append((one_shot, inverse))
        start, z = z if step else one_shot, one_shot
        if step < refine or share(ratio) < 1.0:
            q = sym(product(r, inverse, precision))
            z = lyapunov(q, 2 * k, start, CG_STEPS, precision)
        if step < refine:
            s = s + OVER_RELAXATION * (sym(product(z, q, precision)) - s)
    z = _contract(z + share(ratio, refine) * (one_shot - z))
    return _Along(z, *roots[0])


def _across(
    z: Tensor, c: Tensor, noise: Tensor, precision: Precision | None
) -> tuple[Tensor, Tensor]:
    """X = C^-1 # (I + Z^2), and where it broke. X C X = L L^T for any factor L L^T = I + Z^2."""
    one, n = eye(z), z.shape[-1]
    low, info = _factor(z, JITTER, precision)
    inside = sym(product(low.mT, product(c, low, precision), precision))
    inside = inside + (SOFT * trace(c).clamp_min(0) / n + noise) * one
    root = _inverse_root(inside, precision)
    x = sym(product(low, product(root, low.mT, precision), precision))
    # ||A||_F^2 = ||Z||_F^2 + tr(X C X). A comparison with nan is False, so nan counts as broken.
    energy = inner(z, z) + inner(x, product(c, x, precision))
    return x, (info[..., None, None] != 0) | ~(energy <= ENERGY * n)


def rectangular_exact_products(ratio: float) -> float:
    """Those of `rectangular_products` that need digits; where `precision` is bf16x3 only these."""
    return 5 * ratio + 2


def _factor(z: Tensor, jitter: float, precision: Precision | None) -> tuple[Tensor, Tensor]:
    """L with L L^T = (1 + jitter) I + Z^2, and where there is none (not 0)."""
    inside = sym(product(z, z, precision)) + (1 + jitter) * eye(z)
    found = torch.linalg.cholesky_ex(inside)
    return found.L, found.info


def rectangular(
    u: Tensor,
    grad: Tensor,
    refine: int = 0,
    polar: Polar | None = None,
    precision: Precision | None = None,
) -> Solution:
    """LGM direction from polar factors of long matrices: safe when `polar` computes in bf16.

    The factors may be crude: what is across U is projected off U, so the direction is tangent to
    the rounding of `precision`.

    Shapes, refine: as `gram`. polar: of (..., long, short) matrices.
    precision: of the products that digits depend on: U^T G, what is across U, and the projection
        at the end. None computes in the dtype of `grad`; with bf16x3 the others, which steer the
        factors or the equation along U, take one bf16 product (`rough_product`).
    Returns: as `gram`; with bf16 factors the spectral norm is 1.001 at most (measured).
    Cost: 2 + refine polar factors and 10 r + 8 + refine (3 r + 7) other products of n x n
        (`rectangular_products`).
    """
    polar = polar or Polar()
    n, ratio = u.shape[-1], u.shape[-2] / u.shape[-1]
    g = unit_frobenius(grad) * math.sqrt(n)
    b = product(u.mT, g, precision)
    k, across = skew(b), g - product(u, b, precision)
    size = ((inner(k, k) + inner(across, across)) / n).sqrt()
    s, z, factors = torch.zeros_like(k), torch.zeros_like(k), []
    for step in range(refine + 1):
        m = across + rough_product(u, k + s, precision)
        factors.append(polar(m))
        q = sym(rough_product(m.mT, factors[-1], precision)) + SHIFT * size * eye(k)
        one_shot = skew(rough_product(u.mT, factors[-1], precision))
        z = lyapunov(q, 2 * k, z if step else one_shot, CG_STEPS, precision)
        if step < refine:
            s = s + OVER_RELAXATION * (sym(rough_product(z, q, precision)) - s)
    z = _contract(z + share(ratio, refine) * (one_shot - z), ROUGH_MARGIN)
    low, info = _factor(z, ROUGH_JITTER, precision)
    v = polar(rough_product(across, low, precision))
    # V has singular values that are off by 1%, and the direction's norm would be: a cubic polar
    # step V (3 I - V^T V)/2 on the way. Where V is in bf16 its rough Gram is exact.
    right = product(1.5 * eye(k) - 0.5 * rough_product(v.mT, v, precision), low.mT, precision)
    y = product(v, right, precision)
    broken = (info[..., None, None] != 0) | ~(inner(z, z) + inner(y, y) <= ENERGY * n)
    y = factors[0].where(broken, y)
    # A = Y - U (U^T Y - Z) has U^T A = Z. For the one-shot step Z is the skew part of U^T Y.
    along = product(u.mT, y, precision)
    a = y - product(u, along - skew(along).where(broken, z), precision)
    # A gradient that is normal to rounding: the direction is made of noise, so let it be short.
    eps = 2.0**-19 if precision is Precision.BF16X3 else torch.finfo(g.dtype).eps
    return Solution(a * (size / (64 * eps)).clamp(max=1.0), broken[..., 0, 0])


def rectangular_products(ratio: float, refine: int = 0) -> float:
    """Products of n x n that `rectangular` takes besides its 2 + refine polar factors."""
    each = 3 * ratio + 1 + CG_STEPS
    return 7 * ratio + (1 + refine) * each + refine + 2 + 1 / 6


def lyapunov(
    q: Tensor, right: Tensor, start: Tensor, steps: int, precision: Precision | None = None
) -> Tensor:
    """Skew Z with ZQ + QZ = right, by conjugate gradients on skew matrices.

    Shapes: (..., n, n); q symmetric positive definite, right and start skew.
    Cost: steps + 1 products, as ZQ = -(QZ)^T.
    """
    z = start
    residual = right - _anticommutator(q, z, precision)
    search, length = residual, inner(residual, residual)
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(steps):
        image = _anticommutator(q, search, precision)
        step = length / (search * image).sum(dim=(-2, -1), keepdim=True).clamp_min(tiny)
        z = z + step * search
        residual = residual - step * image
        before, length = length, inner(residual, residual)
        search = residual + length / before.clamp_min(tiny) * search
    return z


def share(ratio: float, refine: int = 0) -> float:
    """Share of Z' in the mix, for aspect ratio long/short.

    Measured: nearly square matrices want all of it, 4 : 1 about a fifth, and less after refinement.
    Any share is feasible, because contractions form a convex set.
    """
    return min(1.0, 3.0 / ratio**2) ** (4 if refine else 1)


def _contract(z: Tensor, margin: float = 1.003) -> Tensor:
    """Divide by max(1, ||Z||_2): at most 1 in theory, more after truncation and rounding.

    The estimate is a power iteration on Z^T Z, a lower bound; margin and JITTER cover the rest.
    """
    x = torch.linspace(0.9, 1.1, z.shape[-1], dtype=z.dtype, device=z.device).unsqueeze(-1)
    x = x.expand(*z.shape[:-1], 1)
    tiny = torch.finfo(z.dtype).tiny
    for _ in range(POWER_STEPS):
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(tiny)
        x = z.mT @ (z @ x)
    estimate = torch.linalg.vector_norm(x, dim=-2, keepdim=True).sqrt()
    return z / (margin * estimate).clamp_min(1.0)


def _anticommutator(q: Tensor, z: Tensor, precision: Precision | None) -> Tensor:
    """Anticommutator ZQ + QZ of skew Z and symmetric Q."""
    qz = rough_product(q, z, precision)
    return qz - qz.mT


def _noise(inside: Tensor, precision: Precision | None) -> Tensor:
    """Rounding of C = G^T G - B^T B in the 2-norm, given B^T B.

    C is a difference, so this is absolute: a gradient nearly normal to the manifold has a C smaller
    than its own rounding (and than the rounding of U^T U, which B^T B carries), and gets a short
    step instead of a wild one.
    """
    eps = 2.0**-19 if precision is Precision.BF16X3 else torch.finfo(inside.dtype).eps
    return 8 * eps * (8 + math.sqrt(inside.shape[-1]) + inner(inside, inside).sqrt())


def _inverse_root(gram: Tensor, precision: Precision | None) -> Tensor:
    """gram^(-1/2); what was added to it is ridge enough, except in bf16x3."""
    ridge = None if precision is Precision.BF16X3 else 0.0
    return inverse_sqrt(gram, ROOT_STEPS, ROOT_TABLE, precision, ridge)
