"""Certified optimum of the Manifold Muon problem, in float64: for tests and diagnostics."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from geon.optim.linalg import sym
from geon.optim.manifolds.stiefel import tangent_unit
from geon.optim.polar import polar_svd
from geon.optim.solvers.certificate import Dual, root_and_lyapunov, spectral_norm

_ITERATIONS_PER_MU = 40


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
        """Relative distance between the bounds of the optimum."""
        return (self.dual - self.primal) / self.dual if self.dual > 0 else 0.0


def certified_optimum(
    u: Tensor, grad: Tensor, tol: float = 1e-6, max_iterations: int = 600
) -> Certified:
    """Minimise the dual ||G + U S||_* over symmetric S until the bracket is tight.

    Reweighted least squares on the nuclear norm smoothed by mu: each iteration solves a Lyapunov
    equation, diagonal in an eigenbasis, and never raises the smoothed dual. Anderson mixing
    makes that fast; when a mixed point raises it, the plain one is taken instead. mu falls
    tenfold whenever the iterates settle.

    Shapes: u and grad (long, short). u is brought to u^T u = I in float64 first, so that points
    stored in float32 will do.
    Returns: a bracket; its gap is below `tol`, except where `max_iterations` came first (rank
    deficient gradients end between 1e-6 and 1e-4).
    Source: the fixed point of J. Su, kexue.fm 11221, read as majorise-minimise; Anderson (1965).
    Cost: one n x n eigendecomposition an iteration, about a hundred iterations.
    """
    problem = Dual(polar_svd(u), grad)
    size = torch.linalg.matrix_norm(problem.g).item() / math.sqrt(u.shape[1])
    best = Certified(torch.zeros_like(problem.g), -problem.shift, 0.0, math.inf)
    if size == 0.0:
        return best._replace(dual=0.0)
    s, mu, done = torch.zeros_like(problem.k), 0.1 * size, 0
    while done < max_iterations:
        mixer = _Anderson()
        for _ in range(_ITERATIONS_PER_MU):
            done += 1
            point = _evaluate(problem, s, max(mu, 1e-13 * size))
            best = _better(best, problem, s, point)
            if best.gap < tol:
                return best
            step = point.target - s
            if torch.linalg.matrix_norm(step).item() < 1e-3 * mu:
                break
            s = mixer.next(s, step, point.smoothed)
        mu *= 0.1
    return best


class _Point(NamedTuple):
    direction: Tensor
    primal: float
    dual: float
    smoothed: float
    target: Tensor


def _evaluate(problem: Dual, s: Tensor, mu: float) -> _Point:
    """Bounds of the optimum at s, and the minimiser of the majorant there."""
    singular, v = problem.spectrum(s)
    q = (singular**2 + mu * mu).sqrt()
    a = tangent_unit(problem.u, (problem.u @ (problem.k + s) + problem.across) @ (v / q) @ v.mT)
    a = a / max(1.0, spectral_norm(a).item())
    return _Point(
        direction=a,
        primal=(problem.g * a).sum().item(),
        dual=singular.sum().item(),
        smoothed=q.sum().item(),
        target=root_and_lyapunov(problem, q, v),
    )


def _better(best: Certified, problem: Dual, s: Tensor, point: _Point) -> Certified:
    if point.primal > best.primal:
        best = best._replace(direction=point.direction, primal=point.primal)
    if point.dual < best.dual:
        best = best._replace(multiplier=s - problem.shift, dual=point.dual)
    return best


class _Anderson:
    """Mixes the last steps of a fixed-point iteration; falls back when the objective rises."""

    def __init__(self, memory: int = 8) -> None:
        self.memory = memory
        self.points: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.objective = math.inf

    def next(self, x: Tensor, step: Tensor, objective: float) -> Tensor:
        """Next iterate of the fixed-point iteration after x, whose plain successor is x + step."""
        if objective > self.objective * (1 + 1e-12):
            x, step = self.points[-1], self.steps[-1]
            self.points, self.steps, self.objective = [], [], math.inf
            return x + step
        self.objective = objective
        self.points = [*self.points, x][-self.memory :]
        self.steps = [*self.steps, step][-self.memory :]
        if len(self.points) == 1:
            return x + step
        dx, df = _differences(self.points), _differences(self.steps)
        weights = torch.linalg.lstsq(df, step.flatten()[:, None]).solution
        return sym(x + step - ((dx + df) @ weights).view_as(x))


def _differences(history: list[Tensor]) -> Tensor:
    pairs = zip(history[1:], history[:-1], strict=True)
    return torch.stack([(after - before).flatten() for after, before in pairs], dim=1)
