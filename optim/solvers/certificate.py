"""How good a Manifold Muon direction is: a bracket of the optimum that needs no trust in it."""

from typing import NamedTuple

import torch
from torch import Tensor

from geon.optim.linalg import skew, sym
from geon.optim.manifolds.stiefel import tangent_unit


class Dual:
    """The dual problem min ||G + U S||_* over symmetric S, in n x n terms and float64.

    With s = S + sym(U^T G), (G + U S)^T (G + U S) = (K + s)^T (K + s) + C.

    Attributes:
        k: skew(U^T G). c: P^T P, P the part of G across U. shift: sym(U^T G).
    """

    def __init__(self, u: Tensor, grad: Tensor) -> None:
        self.u, self.g = u.double(), grad.double()
        b = self.u.mT @ self.g
        self.k, self.shift = skew(b), sym(b)
        self.across = self.g - self.u @ b
        self.c = sym(self.across.mT @ self.across)

    def spectrum(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values of G + U S and their right vectors, (..., n) and (..., n, n)."""
        m = self.k + s
        values, vectors = torch.linalg.eigh(sym(m.mT @ m) + self.c)
        return values.clamp_min(0.0).sqrt(), vectors


def root_and_lyapunov(dual: Dual, singular: Tensor, v: Tensor) -> Tensor:
    """S = sym(ZQ) for ZQ + QZ = 2K, Q = V diag(singular) V^T: one step of least squares."""
    k = v.mT @ dual.k @ v
    total = singular.unsqueeze(-1) + singular.unsqueeze(-2)
    # With Z = 2K / total in the eigenbasis, sym(ZQ) = (ZQ - QZ) / 2.
    difference = singular.unsqueeze(-2) - singular.unsqueeze(-1)
    return sym(v @ (k * difference / total) @ v.mT)


class Certificate(NamedTuple):
    """Bounds of f* = max <G, A>, and what was wrong with the direction, (...,) float64 each.

    Attributes:
        primal: <G, A> after A was projected on the tangent space and divided by max(1, ||A||_2):
            what is really attained, at most f*.
        dual: ||G + U S||_* for some symmetric S: at least f*, whatever S is.
        tangency: ||U^T A + A^T U||_F / sqrt(n) of A as given.
        norm: ||A||_2 as given.
    """

    primal: Tensor
    dual: Tensor
    tangency: Tensor
    norm: Tensor

    @property
    def gap(self) -> Tensor:
        """(dual - primal) / dual: a direction that descends attains 1 - gap of f* or more."""
        return torch.where(self.dual == 0, 0.0, 1.0 - self.primal / self.dual)


def certify(u: Tensor, grad: Tensor, direction: Tensor, rounds: int = 4) -> Certificate:
    """Bracket the optimum and place a direction, from any solver, in the bracket.

    The dual bound starts at the multiplier that LGM's own by-products give, S = sym(ZQ), and takes
    `rounds` more steps of reweighted least squares, keeping the best.

    Shapes: (..., long, short), u^T u = I to fp32 rounding.
    Source: weak duality: <G, A> = <G + U S, A> <= ||G + U S||_* for tangent A, ||A||_2 <= 1.
    Cost: 3 + rounds eigendecompositions of n x n in float64; for the log, not for every step.
    """
    sound = u.isfinite() & grad.isfinite() & direction.isfinite()
    sound = sound.all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    # An eigensolver raises for the whole batch if one matrix holds a nan: that one's answer is nan.
    problem = Dual(torch.where(sound, u, 0.0), torch.where(sound, grad, 0.0))
    n = u.shape[-1]
    a = torch.where(sound, direction, 0.0).double()
    defect = 2.0 * sym(problem.u.mT @ a)
    tangent = tangent_unit(problem.u, a)
    norm = spectral_norm(a)
    attained = (problem.g * tangent).sum(dim=(-2, -1)) / spectral_norm(tangent).clamp_min(1.0)
    singular, v = problem.spectrum(torch.zeros_like(problem.k))
    dual = singular.sum(dim=-1)
    for _ in range(1 + rounds):
        mean = singular.mean(dim=-1, keepdim=True)
        smoothed = (singular**2 + (1e-3 * mean) ** 2).sqrt().clamp_min(1e-300)
        singular, v = problem.spectrum(root_and_lyapunov(problem, smoothed, v))
        dual = dual.minimum(singular.sum(dim=-1))
    tangency = torch.linalg.matrix_norm(defect) / n**0.5
    found = (attained, dual, tangency, norm)
    return Certificate(*(torch.where(sound[..., 0, 0], x, torch.nan) for x in found))


def spectral_norm(a: Tensor) -> Tensor:
    """||A||_2 by the eigenvalues of the n x n Gram: several times faster than an SVD."""
    return torch.linalg.eigvalsh(sym(a.mT @ a))[..., -1].clamp_min(0.0).sqrt()
