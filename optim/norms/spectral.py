import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from geon.optim.costs import Cost
from geon.optim.linalg import gaussian
from geon.optim.norms.base import Norm
from geon.optim.polar import Polar

SCALES = ("rms", "muon", "none")


@dataclass(frozen=True)
class Spectral(Norm):
    """RMS -> RMS operator norm sqrt(d_in/d_out) ||W||_2: hidden matrices.

    Attributes:
        scale: factor on the polar factor: "rms" sqrt(d_out/d_in) (Bernstein and Newhouse, arXiv
            2410.21265), "muon" sqrt(max(1, d_out/d_in)) (K. Jordan), "none" 1.
        polar: how the polar factor is computed.
    """

    scale: str = "rms"
    polar: Polar = field(default_factory=Polar)

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"spectral_scale '{self.scale}' is not one of {', '.join(SCALES)}")

    def factor(self, shape: tuple[int, ...]) -> float:
        """Spectral norm of a matrix of this shape whose norm is 1."""
        ratio = shape[-2] / shape[-1]
        return {"rms": math.sqrt(ratio), "muon": math.sqrt(max(1.0, ratio)), "none": 1.0}[
            self.scale
        ]

    def value(self, weight: Tensor) -> Tensor:
        """Norm of each matrix, (...): ||W||_2 over the factor."""
        return torch.linalg.matrix_norm(weight, 2) / self.factor(weight.shape)

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the nuclear norm times the factor."""
        return torch.linalg.matrix_norm(grad, "nuc") * self.factor(grad.shape)

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: the gradient's polar factor times the factor."""
        return self.polar(grad) * self.factor(shape or grad.shape)

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point of norm 1: a uniform semi-orthogonal matrix times the factor."""
        wide = shape[0] < shape[1]
        draw = gaussian((shape[1], shape[0]) if wide else shape, generator)
        q, r = torch.linalg.qr(draw)
        q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
        return (q.mT if wide else q).contiguous() * self.factor(shape)

    def extent(self, shape: tuple[int, ...]) -> float:
        """Extent, the Frobenius norm of a full direction: the factor times sqrt(short side)."""
        return self.factor(shape) * math.sqrt(min(shape[-2:]))

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of one LMO: a polar factor, and the factor on it."""
        scaling = Cost(words=2 * shape[0] * shape[1], operators=1)
        return self.polar.cost(shape, device) + scaling
