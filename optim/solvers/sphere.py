"""Closed forms on spheres, and in the Frobenius norm on any manifold.

Every direction A here maximises <G, A> over tangent A with norm at most 1; `grad` and `weight`
are (..., d_out, d_in) as stored, and the result has the shape and dtype of `grad`.
"""

import torch
from torch import Tensor

from geon.optim.linalg import unit_frobenius, unit_max
from geon.optim.manifolds.base import Manifold
from geon.optim.manifolds.sphere import remove_along


def tangent_normalised(grad: Tensor, weight: Tensor, manifold: Manifold) -> Tensor:
    """Riemannian gradient over its length: P_T(G) / ||P_T(G)||_F, exact.

    Zero only where the projection is exactly zero: of a gradient normal to the manifold it may
    leave rounding noise, and this is normalised like any other.

    Returns: A with ||A||_F = 1.
    Cost: two tangent projections.
    """
    # The second projection removes what rounding left of the normal part of a gradient that was
    # mostly normal; one more would change nothing (Kahan: "twice is enough").
    tangent = manifold.tangent(weight, manifold.tangent(weight, unit_max(grad, (-2, -1))))
    return unit_frobenius(tangent)


def row_tangent_normalised(grad: Tensor, weight: Tensor, dim: int = -1) -> Tensor:
    """Each row (dim -1) or column (dim -2) of G made orthogonal to that of W, and of length 1.

    The steepest direction on the oblique manifold in the norm max ||row||_2, vector by vector:
    local to a shard that holds whole vectors. Zero vectors of G (unseen tokens) stay zero.

    Returns: A with vectors of 2-norm 1.
    """
    once = remove_along(grad, weight, dim)
    return unit_frobenius(remove_along(once, weight, dim), dim)  # twice is enough, see above


def tangent_sign(grad: Tensor, weight: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    """Signs orthogonal to the weight: maximise <g, a>, |a_i| <= 1, <w, a> = 0; exact.

    a = sign(g - lam w), where lam is the median of g_i / w_i with weights |w_i|: the minimiser of
    the dual ||g - lam w||_1. Coordinates tied at the median share one value of w_i's sign, in
    [-1, 1], that makes <w, a> = 0. So permutations of coordinates permute the result, and the
    zero vector (all tied, at 0) gives zero.

    Shapes: dim -1 or -2: every row or column is a vector (oblique); (-2, -1): the whole matrix is
        one (sphere).
    Returns: A with entries in [-1, 1]; all but the tied ones are -1 or 1, or 0 where both the
        gradient and the weight are.
    Cost: one sort; sums in float64, because a vector may hold millions of entries.
    """
    if isinstance(dim, tuple):
        return tangent_sign(grad.flatten(-2), weight.flatten(-2), -1).reshape(grad.shape)
    if dim == -2:
        return tangent_sign(grad.mT, weight.mT, -1).mT
    g, w = unit_max(grad, -1), unit_max(weight, -1)
    free = w.abs() < torch.finfo(w.dtype).tiny  # no part in <w, a>, and no ratio
    share = w.abs().masked_fill(free, 0.0)
    ratio = (g / w).masked_fill(free, torch.inf)
    lam = _weighted_median(ratio, share)
    above, below, tied = ratio > lam, ratio < lam, ratio == lam
    signs = above.to(g.dtype) - below.to(g.dtype)
    balance = (share * signs).sum(dim=-1, keepdim=True, dtype=torch.float64)
    mass = (share * tied).sum(dim=-1, keepdim=True, dtype=torch.float64)
    level = -balance / torch.where(mass > 0, mass, torch.ones_like(mass))
    signs = torch.where(tied, level.clamp(-1.0, 1.0).to(g.dtype), signs)
    return torch.where(free, torch.sign(g), torch.sign(w) * signs)


def _weighted_median(values: Tensor, shares: Tensor) -> Tensor:
    """First value, in increasing order, at which half of the shares are reached."""
    ordered, order = values.sort(dim=-1)
    reached = shares.gather(-1, order).cumsum(dim=-1, dtype=torch.float64)
    index = (reached >= 0.5 * reached[..., -1:]).to(torch.uint8).argmax(dim=-1, keepdim=True)
    return ordered.gather(-1, index)
