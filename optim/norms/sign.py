import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.optim.norms.base import Norm, Reach


@dataclass(frozen=True)
class Sign(Norm):
    """Bound d_in max|W_ij| of the RMS -> inf norm: heads, and weights tied to the embedding.

    Source: Pethick et al., arXiv 2502.07529, Table 2.
    """

    reach = Reach.ENTRY

    def value(self, weight: Tensor) -> Tensor:
        """Norm of each matrix, (...): d_in times the largest magnitude."""
        return weight.abs().amax(dim=(-2, -1)) * weight.shape[-1]

    def dual(self, grad: Tensor) -> Tensor:
        """Dual norm, (...): the sum of magnitudes over d_in."""
        return grad.abs().sum(dim=(-2, -1)) / grad.shape[-1]

    def lmo(self, grad: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Direction of this norm: sign(G) / d_in."""
        return torch.sign(grad) / (shape or grad.shape)[-1]

    def init(self, shape: tuple[int, int], generator: Generator) -> Tensor:
        """Random point of norm 1: random signs over d_in."""
        coin = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        return (2.0 * coin - 1.0) / shape[-1]

    def extent(self, shape: tuple[int, ...]) -> float:
        """Extent, the Frobenius norm of a full direction: sqrt(d_out/d_in)."""
        return math.sqrt(shape[-2] / shape[-1])
