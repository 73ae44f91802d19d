"""The published Manifold Muon solver, dual ascent, as a comparator."""

import math

import torch
from torch import Tensor

from geon.optim.linalg import sym, unit_frobenius
from geon.optim.polar import Polar


def dual_ascent(
    u: Tensor,
    grad: Tensor,
    steps: int = 100,
    rate: float = 0.1,
    normalise: bool = True,
    polar: Polar | None = None,
) -> Tensor:
    """Minimise ||G + 2 U L||_* over symmetric L by subgradient steps; return msign(G + 2 U L).

    L starts at -sym(U^T G)/2 and moves by rate (1 - step/steps) along U^T A + A^T U. The published
    settings are steps=100, rate=0.01, normalise=False, polar=Polar(steps=10): L then travels at
    most about 1, whatever the size of G, so the result depends on the scale of G, and at the
    gradient scale of language models (rms singular value 1e-3) it does not solve the problem.
    normalise=True divides G by its rms singular value first, which makes rate=0.1 work.

    Shapes: u and grad (..., long, short), u^T u = I.
    Returns: a direction of spectral norm about 1, tangent only as far as the ascent got: the
        defect ||U^T A + A^T U||_F / sqrt(n) is not small in general.
    Source: J. Bernstein, Thinking Machines (2025), DOI 10.64434/tml.20250926.
    Cost: `steps` polar factors and 2 `steps` + 1 long products.
    """
    polar = polar or Polar(steps=10)
    g = unit_frobenius(grad) * math.sqrt(u.shape[-1]) if normalise else grad
    multiplier = -0.5 * sym(u.mT @ g)
    direction = torch.zeros_like(g)
    for step in range(steps):
        direction = polar(g + 2.0 * (u @ multiplier))
        multiplier = multiplier - rate * (1.0 - step / steps) * 2.0 * sym(u.mT @ direction)
    return direction


def dual_ascent_products(ratio: float, steps: int, polar_steps: int) -> float:
    """Products of n x n (2 n^3 FLOPs each) for aspect ratio long/short."""
    return ratio + steps * (polar_steps * (2 * ratio + 1) + 2 * ratio)
