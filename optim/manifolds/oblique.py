import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.manifolds.base import Manifold, check_radius
from geon.optim.manifolds.sphere import refuse_zero_vectors, remove_along

AXES = {"rows": -1, "columns": -2}


@dataclass(frozen=True)
class Oblique(Manifold):
    """Each row (or column) on a sphere of its own: its root mean square is `radius`.

    Rows of an embedding, stored (vocab, d), are token vectors; rows of a head are logits' weights.

    Attributes:
        radius: root mean square of the entries of a vector.
        axis: "rows" or "columns": which vectors have fixed length.
    """

    radius: float = 1.0
    axis: str = "rows"

    removes_decay = True

    def __post_init__(self) -> None:
        check_radius(self, self.radius)
        if self.axis not in AXES:
            raise ValueError(
                f"axis '{self.axis}' of the oblique manifold is not one of {', '.join(AXES)} "
                "(manifold=oblique, manifold=oblique_columns)"
            )

    @property
    def dim(self) -> int:
        """Dimension along which a vector of fixed length lies: -1 for rows, -2 for columns."""
        return AXES[self.axis]

    def vector_length(self, shape: tuple[int, ...]) -> float:
        """2-norm that each vector (row or column) of a weight of this shape has."""
        return self.radius * math.sqrt(shape[self.dim])

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of every point: radius * sqrt(d_out d_in)."""
        return self.radius * math.sqrt(shape[-2] * shape[-1])

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part of a vector: v - w <w, v> / <w, w>, row by row or column by column."""
        return remove_along(vector, weight, self.dim)

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Retracted weight: each vector rescaled to its length."""
        return unit_frobenius(weight, self.dim) * self.vector_length(weight.shape)

    def residual(self, weight: Tensor) -> Tensor:
        """Residual of each matrix: largest | |w| / length - 1 | over its vectors w."""
        norms = torch.linalg.vector_norm(weight, dim=self.dim)
        return (norms / self.vector_length(weight.shape) - 1.0).abs().amax(dim=-1)

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point: vectors uniform on their spheres."""
        return self.project(gaussian(shape, generator))

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of a weight: each vector rescaled to its length, in float64."""
        refuse_zero_vectors(weight, self.dim, self.axis[:-1], "oblique manifold")
        return self.retract(weight.double()).to(weight.dtype)
