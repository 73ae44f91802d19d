import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.linalg import gaussian, unit_frobenius
from geon.optim.manifolds.base import Manifold, check_radius


@dataclass(frozen=True)
class Sphere(Manifold):
    """Matrices of one Frobenius norm, `length`: the whole matrix is one long vector."""

    radius: float = 1.0

    removes_decay = True

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    @abstractmethod
    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of every point of this shape."""

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part of a vector: V - W <W, V> / <W, W>."""
        return remove_along(vector, weight, (-2, -1))

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Rescaled weight: from W - eta A, A tangent, the exact rotation by atan(|eta A| / |W|)."""
        return unit_frobenius(weight) * self.length(weight.shape)

    def residual(self, weight: Tensor) -> Tensor:
        """Residual of each matrix: | ||W||_F / length - 1 |."""
        norm = torch.linalg.vector_norm(weight, dim=(-2, -1))
        return (norm / self.length(weight.shape) - 1.0).abs()

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point, uniform on the sphere."""
        return self.project(gaussian(shape, generator))

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of a weight: the weight rescaled, in float64."""
        refuse_zero_vectors(weight, (-2, -1), "matrix", f"{type(self).__name__} manifold")
        return self.retract(weight.double()).to(weight.dtype)


@dataclass(frozen=True)
class Hypersphere(Sphere):
    """||W||_F = radius sqrt(d_out d_in): the root mean square of the entries is `radius`."""

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of every point: radius * sqrt(d_out d_in)."""
        return self.radius * math.sqrt(shape[-2] * shape[-1])


@dataclass(frozen=True)
class FrobeniusSphere(Sphere):
    """The sphere through the Stiefel points of its radius: sum of squared singular values fixed.

    Its points have singular values of root mean square radius * sqrt(d_out/d_in).
    """

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of every point: radius * sqrt(d_out/d_in * short side)."""
        return self.radius * math.sqrt(shape[-2] / shape[-1] * min(shape[-2:]))


def remove_along(vector: Tensor, weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Remove from each vector along `dim` its component along the weight there.

    The weight is made a unit vector first: <W, V> itself leaves the fp32 range when V holds
    entries of 1e30. Zero weights remove nothing.
    """
    unit = unit_frobenius(weight, dim)
    return vector - unit * (unit * vector).sum(dim=dim, keepdim=True)


def refuse_zero_vectors(
    weight: Tensor, dim: int | tuple[int, ...], what: str, manifold: str
) -> None:
    """Raise ValueError where a vector along `dim` is zero (or not finite): it has no direction."""
    lost = ~(weight.double().square().sum(dim=dim) > 0)
    if bool(lost.any()):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} with {int(lost.sum())} zero {what}(s) has no "
            f"nearest point on the {manifold}: zero-initialised weights cannot be on it "
            "(set model.zero_init_proj=false, or give it manifold=euclidean; for LoRA take muon)"
        )
