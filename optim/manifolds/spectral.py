"""Bounds on the largest singular value: the spectral ball and its surface, and the tools for it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.costs import Cost, products
from geon.optim.linalg import (
    accurate_on,
    frobenius,
    gaussian,
    multiply_add,
    orient,
    orient_like,
    unit_frobenius,
    unit_scaled,
)
from geon.optim.manifolds.base import Manifold, check_radius
from geon.optim.manifolds.sphere import refuse_zero_vectors
from geon.optim.manifolds.stiefel import FAR_ABOVE
from geon.optim.polar.iterate import polar as polar_iterate

PolarFactor = Callable[[Tensor], Tensor]
"""A batch (..., d_out, d_in) -> its polar factors; zero in, zero out."""

# 2^8 power iterations: see `top_pair`.
_DOUBLINGS = 8

# Schatten-64 norms are off by up to 3e-3 where products are in bf16.
_CERTAINLY_INSIDE = 0.99


@dataclass(frozen=True)
class _Spectral(Manifold):
    radius: float = 1.0

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def bound(self, shape: tuple[int, ...]) -> float:
        """Largest singular value allowed: radius * sqrt(d_out/d_in)."""
        return self.radius * math.sqrt(shape[-2] / shape[-1])

    def top(self, weight: Tensor) -> Tensor:
        """||W||_2 of each matrix over the bound, up to the error of `top_pair`."""
        u, v = top_pair(weight)
        return (u * (weight @ v)).sum(dim=(-2, -1)) / self.bound(weight.shape)


@dataclass(frozen=True)
class SpectralBall(_Spectral):
    """||W||_2 <= radius * sqrt(d_out/d_in): the RMS -> RMS norm of the weight is at most `radius`.

    Weight decay acts here: it moves singular values inwards.
    """

    flat = True

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of the starting point, all singular values at the bound."""
        return self.bound(shape) * math.sqrt(min(shape[-2:]))

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part of a vector: the vector itself, as there is no constraint inside the ball.

        On the boundary the admissible directions are a cone, not a space, and the projection on it
        is not linear. It is not taken: a step may point outwards, and `retract` cuts it off, which
        is a projected step instead of a tangent one.
        """
        return vector

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Cap the singular values at the bound by two polar factors; others stay as they are.

        Matrices whose Schatten-64 norm is within the bound are left alone: most of the time that is
        all of them. To ask makes a GPU's queue run dry, which costs less than twenty polar steps.
        """
        size = self._size(weight)
        if bool(size.amax() <= _CERTAINLY_INSIDE):  # false for nan
            return weight
        over, moved = ~(size <= _CERTAINLY_INSIDE), weight.clone()
        moved[over] = hard_cap(weight[over], self.bound(weight.shape))
        return moved

    def _size(self, weight: Tensor) -> Tensor:
        """Schatten-64 norm of each matrix over the bound."""
        return schatten_64(weight / self.bound(weight.shape))

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of the norm that decides on a cap; a cap costs two polar factors more."""
        short, entries = min(shape), shape[0] * shape[1]
        arithmetic = "fp32" if device == "cpu" else "bf16"
        return products(2 * short * entries + 8 * short**3, arithmetic, 3 * entries, operators=11)

    def residual(self, weight: Tensor) -> Tensor:
        """How far ||W||_2 is above the bound, relative to it. Cost: one SVD."""
        excess = torch.linalg.matrix_norm(weight, 2) / self.bound(weight.shape) - 1.0
        return excess.clamp(min=0.0)

    def distance(self, weight: Tensor) -> Tensor:
        """Residual by power iterations instead of an SVD."""
        return (self.top(weight) - 1.0).clamp(min=0.0)

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Gaussian with its largest singular values, a few of them, cut off by the bound."""
        size = 1.25 * self.bound(shape) / (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        return self.project(gaussian(shape, generator) * size)

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point: singular values clipped, by SVD in float64 where one may be too large."""
        if bool((self._size(weight) <= _CERTAINLY_INSIDE).all()):
            return weight
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        clipped = s.clamp(max=self.bound(weight.shape))
        return ((u * clipped.unsqueeze(-2)) @ vh).to(weight.dtype)


@dataclass(frozen=True)
class SpectralSphere(_Spectral):
    """||W||_2 = radius * sqrt(d_out/d_in): the largest singular value is fixed, the others below.

    Smooth where the largest singular value is simple. Elsewhere the pair that `top_pair` returns,
    some unit vectors of the leading space, stands for it.
    """

    # W itself is not normal here (u v^T is), but the retraction divides by ||W||_2.
    removes_decay = True

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of the starting point, on average over draws (to 2% from 5 x 5 on).

        The largest eigenvalue of a Gaussian's Gram matrix is center - 1.2065 spread on average.

        Source: Johnstone (2001), centered as in Ma (2012); the mean of the Tracy-Widom law.
        """
        root = [math.sqrt(side - 0.5) for side in shape[-2:]]
        center, spread = sum(root) ** 2, sum(root) * sum(1 / r for r in root) ** (1 / 3)
        # The largest eigenvalue is at least the average of them all; this matters below 3 x 3.
        top = max(center - 1.2065 * spread, max(shape[-2:]))
        return self.bound(shape) * math.sqrt(shape[-2] * shape[-1] / top)

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part V - u v^T (u^T V v), (u, v) the top singular pair of the weight."""
        u, v = top_pair(weight)
        return vector - (u * ((u * (vector @ v)).sum(dim=-2, keepdim=True))) @ v.mT

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Retracted weight: divided by its largest singular value. Cost: that of `top_pair`.

        Large steps leave singular values close together, which take more power iterations.
        """
        unit = unit_frobenius(weight)
        u, v = top_pair(unit, _DOUBLINGS + 2 * (angle > FAR_ABOVE))
        top = (u * (unit @ v)).sum(dim=(-2, -1), keepdim=True)
        return unit * (self.bound(weight.shape) / torch.where(top > 0, top, torch.ones_like(top)))

    def residual(self, weight: Tensor) -> Tensor:
        """Residual | ||W||_2 / bound - 1 |. Cost: one SVD, so that errors of `top_pair` show."""
        return (torch.linalg.matrix_norm(weight, 2) / self.bound(weight.shape) - 1.0).abs()

    def distance(self, weight: Tensor) -> Tensor:
        """Residual by power iterations instead of an SVD."""
        return (self.top(weight) - 1.0).abs()

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point: a Gaussian matrix scaled to the bound."""
        draw = gaussian(shape, generator).double()
        size = self.bound(shape) / torch.linalg.matrix_norm(draw, 2)
        return (draw * size).to(torch.get_default_dtype())

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point: singular values clipped, the largest raised, by SVD in float64."""
        refuse_zero_vectors(weight, (-2, -1), "matrix", "spectral sphere")
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        bound = self.bound(weight.shape)
        s = torch.cat([torch.full_like(s[..., :1], bound), s[..., 1:].clamp(max=bound)], dim=-1)
        return ((u * s.unsqueeze(-2)) @ vh).to(weight.dtype)


def top_pair(weight: Tensor, doublings: int = _DOUBLINGS) -> tuple[Tensor, Tensor]:
    """Top singular pair by 2^doublings power iterations, all at once: the Gram matrix squared.

    The start is the coordinate with the largest entry on the diagonal of the last power: no random
    draw, and never orthogonal to the answer. So for every matrix, whatever its gaps,
    u^T W v >= ||W||_2 s^(-1/(2k)), with k = 2^doublings and s the short side: 8 doublings lose at
    most 1.4% for s = 1024. Measured on Gaussian matrices, which have small gaps: below 1e-5.

    Shapes: (..., d_out, d_in) -> u (..., d_out, 1), v (..., d_in, 1), of norm 1; zeros for zero.
    Source: the bound is Jensen's inequality for the spectral measure of the start.
    Cost: 2 l s^2 + 2 s^3 doublings FLOPs; less than half a polar factor of six steps.
    """
    x = unit_frobenius(orient(weight))
    short = unit_scaled(_top_column(x, doublings), dim=-2)
    long = unit_frobenius(x @ short, dim=-2)
    return (long, short) if weight.shape[-2] >= weight.shape[-1] else (short, long)


def top_value(weight: Tensor, doublings: int = _DOUBLINGS) -> Tensor:
    """||W||_2 as `top_pair` finds it, (..., 1, 1), of weights about 1 in size; 0 for zero."""
    x = orient(weight)
    column = _top_column(x, doublings)
    return frobenius(x @ column) / frobenius(column).clamp_min(torch.finfo(x.dtype).tiny)


def _top_column(x: Tensor, doublings: int) -> Tensor:
    """Column of a power of the Gram with the largest diagonal entry, (..., s, 1).

    Normalised at every other doubling: a Gram of Frobenius norm 1 has a fourth power of n^-1.5 at
    least, whose squares fp32 holds up to n = 10^12.
    """
    power = x.mT @ x
    for doubling in range(doublings):
        if doubling % 2 == 0:
            power = unit_scaled(power)
        power = power @ power
    start = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None]
    return power.gather(-1, start.expand(*power.shape[:-1], 1))


def _cap_polar(matrix: Tensor) -> Tensor:
    # Ten steps resolve singular values of 1e-3 of the Frobenius norm (polar/coefficients.py).
    return polar_iterate(matrix, 10, precision=accurate_on(matrix.device))


def schatten_64(weight: Tensor) -> Tensor:
    """(sum of s^64)^(1/64) over the singular values s: ||W||_2 at least, n^(1/64) of it at most.

    For s around 1: s^64 is infinite above 4, and 0 below 1/4.

    Shapes: (..., d_out, d_in) -> (...), in fp32 from bf16 products on a GPU.
    Cost: 2 l s^2 + 8 s^3 FLOPs.
    """
    w = orient(weight) if weight.device.type == "cpu" else orient(weight).bfloat16()
    power = w.mT @ w
    for _ in range(4):
        power = power @ power
    return torch.linalg.matrix_norm(power.float()) ** (1 / 32)


def hard_cap(weight: Tensor, bound: float, polar: PolarFactor = _cap_polar) -> Tensor:
    """Cap the singular values at `bound` by matrix products: W - U (H - c I)_+.

    With U the polar factor, H = U^T W and M = H - c I, the positive part of M is
    (M + M polar(M)) / 2. Singular values below the bound are left as they are, even those that
    the polynomial does not resolve: U (c I + H - |M|) / 2, the same in exact arithmetic, would
    multiply them by the square of the polynomial's error.

    A singular value so close above the bound that |s - c| is below 1e-3 ||M||_F comes at least
    half way; all others come to within 1e-5.

    Shapes: (..., d_out, d_in) -> same.
    Source: spectral hardcap, F. Cesista (2025), by two polar factors.
    Cost: two polar factors (l x s and s x s; of ten steps unless given), and 6 l s^2 FLOPs.
    """
    w = orient(weight)
    u = polar(w)
    m = u.mT @ w
    m = m + m.mT  # twice H, and from the next line on twice M: polar factors have no scale
    m.diagonal(dim1=-2, dim2=-1).sub_(2.0 * bound)
    excess = multiply_add(1.0, m, 1.0, m, polar(m))
    return orient_like(multiply_add(1.0, w, -0.25, u, excess), weight)
