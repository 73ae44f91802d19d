"""One norm for all weights of a network, and steepest descent in it on a product of manifolds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from geon.errors import UsageError
from geon.optim.manifolds import Euclidean, Manifold
from geon.optim.modular.nodes import UNIT, Network, Reading
from geon.optim.norms import NORMS, Norm, Spectral
from geon.optim.polar import polar_svd
from geon.optim.solvers import Ladder, steepest

Weights = Mapping[str, Tensor]
"""Weights, gradients or changes of atoms by key, (d_out, d_in) each; vectors (n,)."""


def split(network: Network, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The atoms' parts of whole parameters, by key."""
    return {key: atom.take(params[atom.param]) for key, atom in network.atoms().items()}


@dataclass(frozen=True)
class ModularNorm:
    """The largest of c_i ||dw_i||_i over the weights of a network.

    Steepest descent splits: every weight steps in its own norm, by 1/c_i.

    Attributes:
        coefficients: c by key; each above 0.
        norms: by key.
    """

    coefficients: Mapping[str, float]
    norms: Mapping[str, Norm]

    def __post_init__(self) -> None:
        for key, c in self.coefficients.items():
            if not 0.0 < c < float("inf"):
                raise UsageError(
                    f"modular norm: the coefficient of '{key}' is {c}: it must be finite and above "
                    "0 (a weight behind a matrix of zeros changes nothing)"
                )

    @classmethod
    def of(
        cls, network: Network, reading: Reading = UNIT, norms: Mapping[str, Norm] | None = None
    ) -> "ModularNorm":
        """The norm of a composition: c_i = (change of the output for a unit change) / (its share).

        The output of the network changes by at most the norm of dw, to first order.

        norms: in place of those that atoms have, by key.

        Source: Large et al., arXiv 2405.14813: composition and concatenation, in one formula.
        """
        changes, shares = network.changes(reading), network.shares()
        own = {key: NORMS[atom.norm]() for key, atom in network.atoms().items()}
        scaled = {key: float(changes[key]) / shares[key] for key in own}
        return cls(scaled, own | dict(norms or {}))

    def norm(self, dw: Weights) -> float:
        """The norm of a change of all weights."""
        own = self.norms
        return max(
            c * float(own[key].value(_matrix(dw[key]))) for key, c in self.coefficients.items()
        )

    def dual(self, grad: Weights) -> float:
        """Largest <grad, dw> over changes of norm 1: the sum of dual norms over c."""
        own = self.norms
        return sum(
            float(own[key].dual(_matrix(grad[key]))) / c for key, c in self.coefficients.items()
        )

    def steepest(self, grad: Weights) -> dict[str, Tensor]:
        """The change of norm 1 that ascends most."""
        return {
            key: (self.norms[key].lmo(_matrix(grad[key])) / c).view_as(grad[key])
            for key, c in self.coefficients.items()
        }


@dataclass(frozen=True)
class ProductManifold:
    """The product of the manifolds of a network's weights, with the modular norm on it.

    Attributes:
        modular: the norm.
        manifolds: by key; those left out are free.
        ladder: solver of Manifold Muon.
    """

    modular: ModularNorm
    manifolds: Mapping[str, Manifold] = field(default_factory=dict)
    ladder: Ladder = field(default_factory=Ladder)

    def norm(self, dw: Weights) -> float:
        """The norm of a change of all weights."""
        return self.modular.norm(dw)

    def tangent(self, weights: Weights, vectors: Weights) -> dict[str, Tensor]:
        """Tangent parts of vectors, each at its weight."""
        return {
            key: self._manifold(key).tangent(_matrix(weights[key]), _matrix(v)).view_as(v)
            for key, v in vectors.items()
        }

    def steepest(self, grad: Weights, weights: Weights) -> dict[str, Tensor]:
        """The tangent change of norm 1 that ascends most: each weight has its own solver."""
        found = {}
        for key, c in self.modular.coefficients.items():
            norm, manifold, g = self.modular.norms[key], self._manifold(key), _matrix(grad[key])
            if manifold.constrains:
                solver = steepest(norm, manifold, self.ladder)
                direction = solver(g[None], _matrix(weights[key])[None]).direction[0]
            else:
                direction = norm.lmo(g)
            found[key] = (direction / c).view_as(grad[key])
        return found

    def dual(self, grad: Weights, weights: Weights) -> float:
        """What `steepest` attains of <grad, dw>: the dual norm of the tangent space."""
        found = self.steepest(grad, weights)
        return sum(float((grad[key] * d).sum()) for key, d in found.items())

    def retract(self, weights: Weights, moved: Weights) -> dict[str, Tensor]:
        """Points that left their manifolds by a step, brought back.

        moved: the weights after the step.
        """
        found = {}
        for key, value in moved.items():
            manifold, angle = self._manifold(key), 0.0
            if manifold.constrains:
                norm, step = self.modular.norms[key], _matrix(value - weights[key])
                length = manifold.length(step.shape) / norm.extent(step.shape)
                angle = float(norm.value(step)) / length
            found[key] = manifold.retract(_matrix(value), angle).view_as(value)
        return found

    def residual(self, weights: Weights) -> float:
        """Largest residual of a weight."""
        return max(
            (float(m.residual(_matrix(weights[key]))) for key, m in self.manifolds.items()),
            default=0.0,
        )

    def _manifold(self, key: str) -> Manifold:
        return self.manifolds.get(key, _FREE)


_FREE = Euclidean()


class ExactSpectral(Spectral):
    """The spectral norm with polar factors by SVD in fp64: for tests and searches."""

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: the exact polar factor times the factor."""
        return polar_svd(grad).to(grad.dtype) * self.factor(shape or grad.shape)


def exact_norms(network: Network) -> dict[str, Norm]:
    """Exact spectral norms for the atoms that have that norm, by key."""
    atoms = network.atoms().items()
    return {key: ExactSpectral() for key, atom in atoms if atom.norm == "spectral"}


def _matrix(value: Tensor) -> Tensor:
    """A vector as one row."""
    return value[None] if value.ndim == 1 else value
