"""Manifolds: one file each; the table below is the only registry."""

from geon.optim.manifolds.base import Manifold
from geon.optim.manifolds.euclidean import Euclidean
from geon.optim.manifolds.stiefel import Stiefel

MANIFOLDS: dict[str, type[Manifold]] = {"euclidean": Euclidean, "stiefel": Stiefel}

__all__ = ["MANIFOLDS", "Euclidean", "Manifold", "Stiefel"]
