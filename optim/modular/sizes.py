"""Upper bounds of a matrix's spectral norm that are never below it."""

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
SQUARINGS = 10
"""Of the Gram: the Schatten norm of order 2^12 is above the largest singular value by a factor of
at most n^(1/2^12): 1.002 for n = 4,096."""
ROWS = 8192
"""Rows that are widened to fp64 at a time."""


@torch.no_grad()
def spectral_bound(weight: Tensor) -> float:
    """Certified upper bound of ||W||_2, in fp64 by products alone.

    The smaller of two bounds of the largest eigenvalue of the Gram G (the short side squared):
    ||G^p||_F^(1/p) with p = 2^10, and the mean t of the eigenvalues plus ||G - t I||_F, which
    is the eigenvalue itself where all are equal (Stiefel). Rounding is bounded and added: that of
    a product of inner size k is at most k u / (1 - k u) of the product of the factors' norms.

    A power iteration would give a lower estimate.
    """
    if weight.shape[0] < weight.shape[1]:
        weight = weight.mT
    weight = weight.detach()
    m, n = weight.shape
    gram = torch.zeros(n, n, dtype=torch.float64, device=weight.device)
    for rows in _pieces(weight):
        wide = rows.double()
        gram += wide.mT @ wide
    gram = (gram + gram.mT) / 2
    trace = float(gram.diagonal().sum())
    if not trace:
        return 0.0
    # trace = ||W||_F^2 up to rounding, which the factor 2 covers with room.
    slack = 2.0 * (m + n) * UNIT_ROUNDOFF * trace
    mean = trace / n
    gram.diagonal().sub_(mean)
    centred = mean + float(gram.norm()) * (1.0 + 1e-12)
    gram.diagonal().add_(mean)
    return (min(centred, _schatten(gram, trace)) + slack) ** 0.5 * (1.0 + 1e-12)


def _schatten(gram: Tensor, trace: float) -> float:
    """||G^p||_F^(1/p) of a positive matrix, rounding included.

    Squares of a matrix of Frobenius norm 1 have a norm of at least 1/sqrt(n), so a square's
    rounding is a share of at most n sqrt(n) u of it; the roots halve each share once more.
    """
    n = gram.shape[0]
    power = gram / trace
    log = torch.tensor(trace, dtype=torch.float64, device=gram.device).log()
    log = log + power.norm().log()
    for i in range(SQUARINGS):
        power = power / power.norm()
        power = power @ power
        log = log + power.norm().log() / 2.0 ** (i + 1)
    return float(log.exp()) * (1.0 + 4.0 * n * n**0.5 * UNIT_ROUNDOFF + 1e-12)


@torch.no_grad()
def largest_row(weight: Tensor) -> float:
    """2-norm of the largest row, in fp64."""
    sizes = [rows.double().norm(dim=-1).max() for rows in _pieces(weight.detach())]
    return float(torch.stack(sizes).max()) * (1.0 + 1e-12)


def _pieces(weight: Tensor) -> list[Tensor]:
    return [weight[start : start + ROWS] for start in range(0, len(weight), ROWS)]
