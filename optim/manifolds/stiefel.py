import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.costs import Cost
from geon.optim.linalg import (
    Precision,
    accurate_on,
    eye,
    gaussian,
    multiply_add,
    orient,
    orient_like,
    product,
    rough_product,
    sym,
)
from geon.optim.manifolds.base import Manifold, check_radius
from geon.optim.polar import polar_of_bounded, polar_svd

# One cubic step turns an error delta of W^T W - I into (3/4) delta^2, and a tangent step of angle
# eta leaves delta <= (4/3) eta^2. Up to 0.05 rad one step ends below 1e-5; above, take two.
TWO_STEPS_ABOVE = 0.05
# Two steps end at 4e-6 here, at 0.2 at 1 rad, and diverge above 1.4: a polar factor comes first.
FAR_ABOVE = 0.2


@dataclass(frozen=True)
class Stiefel(Manifold):
    """All singular values equal: W = c U with U^T U = I (tall) or U U^T = I (wide).

    The scale c = radius * sqrt(d_out/d_in) makes the RMS -> RMS norm of the weight `radius`.
    Wide weights are handled transposed: each method orients, works tall, and orients back.
    """

    radius: float = 1.0

    removes_decay = True

    def __post_init__(self) -> None:
        check_radius(self, self.radius)

    def scale(self, shape: tuple[int, ...]) -> float:
        """The common singular value c of a weight of this shape."""
        return self.radius * math.sqrt(shape[-2] / shape[-1])

    def length(self, shape: tuple[int, ...]) -> float:
        """Frobenius norm of every point: the scale times sqrt(short side)."""
        return self.scale(shape) * math.sqrt(min(shape[-2:]))

    def unit(self, weight: Tensor) -> Tensor:
        """The tall U (..., long, short) of a stored weight."""
        return orient(weight) / self.scale(weight.shape)

    def tangent(self, weight: Tensor, vector: Tensor) -> Tensor:
        """Tangent part of a vector: V - U sym(U^T V)."""
        return orient_like(tangent_unit(self.unit(weight), orient(vector)), vector)

    def retract(self, weight: Tensor, angle: float = 0.0) -> Tensor:
        """Retraction by one cubic Newton-Schulz step U (3 I - U^T U)/2; two above 0.05 radians.

        A tangent step of this angle leaves singular values in [1, sqrt(1 + angle^2)], where
        cubic steps converge below sqrt(3) alone: above 0.2 radians a polar factor comes first.

        Cost: 4 l s^2 FLOPs a step, in the weight's dtype (fp32: bf16 would cost the manifold). On
        a GPU half of them are in bf16x3 and half in bf16: see `cubic_step`.
        """
        u, precision = self.unit(weight), accurate_on(weight.device)
        if angle > FAR_ABOVE:
            # Directions are up to 2/sqrt(3) long, and as tangent as their arithmetic.
            u = polar_of_bounded(u, 0.5, math.hypot(1.0, 1.2 * angle), precision)
        for _ in range(2 if angle > TWO_STEPS_ABOVE else 1):
            u = cubic_step(u, precision)
        return orient_like(u * self.scale(weight.shape), weight)

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of a retraction by one cubic step: in fp32, or half in bf16x3 and half in bf16."""
        entries, half = shape[0] * shape[1], 2 * min(shape) * shape[0] * shape[1]
        if accurate_on(torch.device(device)) is None:
            return Cost(fp32=2 * half, words=4 * entries, operators=4)
        return Cost(bf16x3=half, bf16=half, words=11 * entries, operators=17)

    def residual(self, weight: Tensor) -> Tensor:
        """Residual of each matrix: largest entry of |U^T U - I|."""
        u = self.unit(weight)
        gram = u.mT @ u
        return (gram - eye(gram)).abs().amax(dim=(-2, -1))

    def random_point(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point, uniform on the manifold."""
        return self.project(gaussian(shape, generator))

    def project(self, weight: Tensor) -> Tensor:
        """Nearest point of a weight: its polar factor by SVD in float64, times the scale."""
        spectrum = torch.linalg.svdvals(weight.double())
        if bool((spectrum[..., -1] <= 1e-6 * spectrum[..., 0]).any()):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} with singular values from "
                f"{float(spectrum.min()):.1e} to {float(spectrum.max()):.1e} has no nearest point "
                "on the Stiefel manifold: zero-initialised weights cannot be on it "
                "(set model.zero_init_proj=false, or give it manifold=euclidean; for LoRA, muon)"
            )
        return (polar_svd(weight) * self.scale(weight.shape)).to(weight.dtype)


def cubic_step(u: Tensor, precision: Precision | None = None) -> Tensor:
    """U (3 I - U^T U)/2 = U + U (I - U^T U)/2 for tall u.

    precision: bf16x3 gives I - U^T U its digits, and takes the small correction in bf16, which
    leaves 3e-3 of it: 3e-6 for a step of 0.03 radians. None computes in the dtype of u.
    """
    gram = product(u.mT, u, precision)
    if precision is not Precision.BF16X3:
        return multiply_add(1.5, u, -0.5, u, gram, precision)
    return torch.add(u, rough_product(u, eye(gram) - gram, precision), alpha=0.5)


def tangent_unit(u: Tensor, vector: Tensor, precision: Precision | None = None) -> Tensor:
    """Projection on the tangent space of the unit Stiefel manifold at tall u."""
    return vector - product(u, sym(product(u.mT, vector, precision)), precision)
