"""Pairs solved by a formula, or by a fixed number of polar factors: one line each in `find`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from geon.optim.costs import Cost
from geon.optim.manifolds import (
    DGram,
    Manifold,
    Oblique,
    SpectralSphere,
    Sphere,
)
from geon.optim.manifolds.spectral import top_pair
from geon.optim.norms import RMS, Frobenius, Norm, RowWise, Sign, Spectral
from geon.optim.solvers.base import Solution, Solver
from geon.optim.solvers.dgram import dgram_spectral
from geon.optim.solvers.scalar_dual import scalar_dual
from geon.optim.solvers.sphere import row_tangent_normalised, tangent_normalised, tangent_sign

KNOWN = (
    "any norm on euclidean; frobenius on any; spectral on stiefel, orthogonal, dgram, hypersphere, "
    "frobenius_sphere, spectral_sphere, spectral_ball; sign on hypersphere, frobenius_sphere, "
    "oblique, oblique_columns; rms on hypersphere, frobenius_sphere; rownorm, colnorm on oblique"
)

SCALAR_EVALUATIONS = 4
"""Polar factors for the one dual variable of a sphere: median shortfall 1e-6, at most 2e-2."""
DGRAM_ROUNDS = 3


class Beside(NamedTuple):
    """What a formula takes besides polar factors; tests/optim/test_costs.py counts it again.

    Attributes:
        words: read and written, an entry.
        square_words: read and written, an entry of short x short.
        operators: kernels.
        long, short: fp32 products of long x short by short x short, and of short x short.
        square_factors: polar factors of short x short.
    """

    words: int = 0
    square_words: int = 0
    operators: int = 0
    long: int = 0
    short: int = 0
    square_factors: int = 0


NOTHING = Beside()
ONE_CONSTRAINT = Beside(words=130, operators=260)
DGRAM = Beside(32, 36, 80, long=17, short=11, square_factors=DGRAM_ROUNDS)


@dataclass(frozen=True)
class ClosedForm(Solver):
    """(grad, weight) -> direction by `solve`, which takes so many `polar_factors`."""

    norm: Norm
    manifold: Manifold
    solve: Callable[[Tensor, Tensor], Tensor]
    polar_factors: int = 0
    beside: Beside = NOTHING

    def __call__(self, grad: Tensor, weight: Tensor) -> Solution:
        """Directions of a batch of gradients by the formula."""
        return Solution(self.solve(grad, weight))

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of the polar factors, or of one LMO, and of what is beside them."""
        short, entries = min(shape), shape[0] * shape[1]
        own = Cost(
            fp32=2 * self.beside.long * short * entries + 2 * self.beside.short * short**3,
            words=self.beside.words * entries + self.beside.square_words * short**2,
            operators=self.beside.operators,
        )
        inner = self.norm.cost((short, short), device).times(self.beside.square_factors)
        return own + inner + self.norm.cost(shape, device).times(max(1, self.polar_factors))

    def inspect(self, grad: Tensor, weight: Tensor, direction: Tensor) -> dict[str, Tensor]:
        """Share of the direction that is normal to the manifold."""
        normal = direction - self.manifold.tangent(weight, direction)
        size = direction.norm(dim=(-2, -1))
        return {"tangency": normal.norm(dim=(-2, -1)) / size.clamp_min(1e-30)}


def find(norm: Norm, manifold: Manifold) -> ClosedForm | None:
    """Solver of a pair (norm, manifold); None when there is no closed form."""
    on_sphere = isinstance(manifold, Sphere)

    def made(
        solve: Callable[[Tensor, Tensor], Tensor], polar_factors: int = 0, beside: Beside = NOTHING
    ) -> ClosedForm:
        return ClosedForm(norm, manifold, solve, polar_factors, beside)

    match norm:
        case _ if manifold.flat:
            # Every direction is tangent; on the ball, the retraction caps what leaves it.
            return made(lambda g, w: norm.lmo(g), int(isinstance(norm, Spectral)))
        case Spectral() if on_sphere:
            solve = lambda g, w: _one_constraint(norm, g, w)  # noqa: E731
            return made(solve, SCALAR_EVALUATIONS, ONE_CONSTRAINT)
        case Spectral() if isinstance(manifold, SpectralSphere):
            solve = lambda g, w: _one_constraint(norm, g, _top(w))  # noqa: E731
            return made(solve, SCALAR_EVALUATIONS, ONE_CONSTRAINT)
        case Spectral() if isinstance(manifold, DGram):
            return made(lambda g, w: _dgram(norm, g, w), 1 + DGRAM_ROUNDS, DGRAM)
        case Frobenius():
            return made(lambda g, w: tangent_normalised(g, w, manifold))
        case RMS() if on_sphere:
            return made(lambda g, w: tangent_normalised(g, w, manifold) * _root_size(g))
        case Sign() if on_sphere:
            return made(lambda g, w: tangent_sign(g, w) / g.shape[-1])
        case Sign() if isinstance(manifold, Oblique):
            dim = manifold.dim
            return made(lambda g, w: tangent_sign(g, w, dim) / g.shape[-1])
        case RowWise() if isinstance(manifold, Oblique) and manifold.dim == -1:
            return made(lambda g, w: row_tangent_normalised(g, w) * norm.row_radius(g.shape))
    return None


def _one_constraint(norm: Spectral, grad: Tensor, theta: Tensor) -> Tensor:
    direction = scalar_dual(grad, theta, norm.polar, SCALAR_EVALUATIONS)
    return direction * norm.factor(grad.shape)


def _dgram(norm: Spectral, grad: Tensor, weight: Tensor) -> Tensor:
    direction = dgram_spectral(grad, weight, norm.polar.of_scaled, DGRAM_ROUNDS)
    return direction * norm.factor(grad.shape)


def _top(weight: Tensor) -> Tensor:
    u, v = top_pair(weight)
    return u @ v.mT


def _root_size(x: Tensor) -> float:
    return math.sqrt(x.shape[-2] * x.shape[-1])
