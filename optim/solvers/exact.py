"""Certified optimum of the Manifold Muon problem, in float64: the oracle of tests and diagnostics."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geon.optim.manifolds.stiefel import skew, sym, tangent_unit


class Certified(NamedTuple):
    """A bracket of the optimum f* = max <G, A>, A tangent, ||A||_2 <= 1.

    `direction` is feasible and gives `primal` <= f*; the symmetric `multiplier` S gives
    `dual` = ||G + U S||_* >= f* by weak duality, whatever was done to find it.
    """

    direction: Tensor
    multiplier: Tensor
    primal: float
    dual: float

    @property
    def gap(self) -> float:
        """Relative distance between the bounds."""
        return (self.dual - self.primal) / self.dual if self.dual > 0 else 0.0


def certified_optimum(
    u: Tensor, grad: Tensor, tol: float = 1e-7, max_iterations: int = 3000
) -> Certified:
    """Minimise the dual ||G + U S||_* over symmetric S by reweighted least squares.

    Each iteration replaces the nuclear norm by its quadratic majorant at the present point,
    smoothed by mu, and solves that exactly: a Lyapunov equation, diagonal in the eigenbasis of
    the weight. mu falls when the iterates settle.

    Shapes: u and grad (long, short), u^T u = I.
    Source: the fixed point of J. Su, kexue.fm 11221, read as majorise-minimise.
    Cost: one n x n eigendecomposition an iteration; hundreds of iterations.
    """
    u, g = u.double(), grad.double()
    n = u.shape[1]
    b = u.mT @ g
    k, normal = skew(b), g - u @ b
    c = sym(normal.mT @ normal)
    size = torch.linalg.matrix_norm(g).item() / math.sqrt(n)
    if size == 0.0:
        return Certified(torch.zeros_like(g), torch.zeros_like(b), 0.0, 0.0)
    mu, s = 1e-2 * size, torch.zeros_like(k)
    best = Certified(torch.zeros_like(g), -sym(b), 0.0, math.inf)
    for _ in range(max_iterations):
        eigenvalues, v = torch.linalg.eigh(sym((k + s).mT @ (k + s) + c))
        eigenvalues = eigenvalues.clamp_min(0.0)
        dual = eigenvalues.sqrt().sum().item()
        q = (eigenvalues + mu * mu).sqrt()
        candidate = tangent_unit(u, (u @ (k + s) + normal) @ (v / q) @ v.mT)
        candidate = candidate / max(1.0, torch.linalg.matrix_norm(candidate, 2).item())
        primal = (g * candidate).sum().item()
        if primal > best.primal:
            best = best._replace(direction=candidate, primal=primal)
        if dual < best.dual:
            best = best._replace(multiplier=s - sym(b), dual=dual)
        if best.gap < tol:
            break
        root = (v * q) @ v.mT
        rotated = v.mT @ (k @ root - root @ k) @ v
        following = sym(v @ (rotated / (q[:, None] + q[None, :])) @ v.mT)
        if torch.linalg.matrix_norm(following - s).item() < 0.3 * mu * math.sqrt(n):
            mu = max(0.7 * mu, 1e-14 * size)
        s = following
    return best
