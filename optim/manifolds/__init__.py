"""Manifolds: one file each; the table below is the only registry."""

from collections.abc import Callable
from functools import partial

from geon.optim.manifolds.base import Manifold
from geon.optim.manifolds.dgram import DGram
from geon.optim.manifolds.euclidean import Euclidean
from geon.optim.manifolds.oblique import Oblique
from geon.optim.manifolds.orthogonal import Orthogonal
from geon.optim.manifolds.spectral import SpectralBall, SpectralSphere
from geon.optim.manifolds.sphere import FrobeniusSphere, Hypersphere, Sphere
from geon.optim.manifolds.stiefel import Stiefel

# Called with radius=..., except euclidean, which has none.
MANIFOLDS: dict[str, Callable[..., Manifold]] = {
    "dgram": DGram,
    "euclidean": Euclidean,
    "frobenius_sphere": FrobeniusSphere,
    "hypersphere": Hypersphere,
    "oblique": Oblique,
    "oblique_columns": partial(Oblique, axis="columns"),
    "orthogonal": Orthogonal,
    "spectral_ball": SpectralBall,
    "spectral_sphere": SpectralSphere,
    "stiefel": Stiefel,
}

__all__ = [
    "MANIFOLDS",
    "DGram",
    "Euclidean",
    "FrobeniusSphere",
    "Hypersphere",
    "Manifold",
    "Oblique",
    "Orthogonal",
    "SpectralBall",
    "SpectralSphere",
    "Sphere",
    "Stiefel",
]
