import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.costs import Cost
from geon.optim.linalg import gaussian, multiply_add, orient, orient_like, unit_frobenius
from geon.optim.manifolds.base import Manifold, check_radius
from geon.optim.manifolds.sphere import refuse_zero_vectors
from geon.optim.manifolds.stiefel import FAR_ABOVE, TWO_STEPS_ABOVE, Stiefel
from geon.optim.polar import polar_of_bounded


@dataclass(frozen=True)
class DGram(Manifold):
    """W^T W diagonal (tall) or W W^T diagonal (wide): orthogonal columns of free length, W = U D.

    A Stiefel point with a gain for each vector of the short side, learned in the weight itself.
    Columns below are those of the tall orientation.

    Attributes:
        radius: training starts with all lengths radius * sqrt(d_out/d_in), on the Stiefel manifold.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of the starting point; training changes it."""
        return self.radius * math.sqrt(shape[-2] / shape[-1] * min(shape[-2:]))

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part V - W S: S_ij = (W^T V + V^T W)_ij / (d_i^2 + d_j^2), 0 on the diagonal.

        Cost: 4 l s^2 FLOPs.
        """
        w, v = orient(weight), orient(vector)
        return orient_like(tangent_tall(w, v, inverse_sums(w)), vector)

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of a retraction by one cubic step, which is in fp32."""
        entries = shape[0] * shape[1]
        return Cost(fp32=4 * min(shape) * entries, words=5 * entries, operators=6)

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Cubic Newton-Schulz steps on the unit columns (two above 0.05 rad); lengths kept.

        Above 0.2 radians a polar factor comes first: cubic steps diverge from far away.

        A column shorter than the others turns by more than `angle`. One that a large step shrinks
        to almost nothing loses its direction; later steps bring it back.

        Cost: 4 l s^2 FLOPs a step, in the weight's dtype.
        """
        w = orient(weight)
        lengths = torch.linalg.vector_norm(w, dim=-2, keepdim=True)
        u = w / lengths.clamp_min(torch.finfo(w.dtype).tiny)
        if angle > FAR_ABOVE:  # unit columns: singular values up to sqrt(short side)
            u = polar_of_bounded(u, 1e-5, math.sqrt(u.shape[-1]))
        for _ in range(2 if angle > TWO_STEPS_ABOVE else 1):
            u = multiply_add(1.5, u, -0.5, u, u.mT @ u)
        return orient_like(u * lengths, weight)

    def residual(self, weight: Tensor) -> Tensor:
        """Residual of each matrix: largest |cosine| between two columns."""
        u = unit_frobenius(orient(weight), dim=-2)
        return zero_diagonal(u.mT @ u).abs().amax(dim=(-2, -1))

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point: uniform directions, log-normal lengths around the starting one."""
        point = Stiefel(self.radius).random_point(shape, generator)
        short = (1, shape[1]) if shape[0] >= shape[1] else (shape[0], 1)
        return point * torch.exp(0.3 * gaussian(short, generator))

    def project(self, weight: Tensor) -> Tensor:
        """Polar factor of the unit columns, at the lengths of the columns; float64.

        Not the nearest point, which has no closed form: that of the nearest orthonormal columns
        to the directions of the columns, which keeps every length.
        """
        w = orient(weight.double())
        side = "column" if w.shape == weight.shape else "row"
        refuse_zero_vectors(w, -2, side, "DGram manifold")
        directions = Stiefel().project(unit_frobenius(w, dim=-2))
        unit = unit_frobenius(directions, dim=-2)
        lengths = torch.linalg.vector_norm(w, dim=-2, keepdim=True)
        return orient_like(unit * lengths, weight).to(weight.dtype)


def inverse_sums(w: Tensor) -> Tensor:
    """1 / (d_i^2 + d_j^2) of the columns of a tall w, (..., s, s), zero on the diagonal.

    Where both are zero it is large, and multiplies a zero.
    """
    squares = w.square().sum(dim=-2)
    sums = squares.unsqueeze(-1) + squares.unsqueeze(-2)
    inverse = sums.clamp_min(torch.finfo(w.dtype).tiny).reciprocal()
    inverse.diagonal(dim1=-2, dim2=-1).zero_()
    return inverse


def tangent_tall(w: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
    """Projection of v on the tangent space at a tall w, with its `inverse_sums`."""
    gram = w.mT @ v
    return multiply_add(1.0, v, -1.0, w, (gram + gram.mT) * inverse)


def zero_diagonal(x: Tensor) -> Tensor:
    """Square matrices (..., n, n) with their diagonal set to 0."""
    return x - torch.diag_embed(x.diagonal(dim1=-2, dim2=-1))
