"""Steepest descent for a pair (norm, manifold): `argmax <grad, A>`, A tangent, norm at most 1."""

from collections.abc import Callable

from torch import Tensor

from geon.errors import UsageError
from geon.optim.manifolds import Euclidean, Manifold, Stiefel
from geon.optim.norms import Norm, Spectral
from geon.optim.solvers.stiefel_spectral import one_shot

Solver = Callable[[Tensor, Tensor], Tensor]
"""(grad, weight), both (..., d_out, d_in) as stored -> direction of the same shape."""


def steepest(norm: Norm, manifold: Manifold) -> Solver:
    """Choose the solver for a pair.

    Raises:
        UsageError: no solver is known for the pair.
    """
    if isinstance(manifold, Euclidean):
        return lambda grad, weight: norm.lmo(grad)
    if isinstance(norm, Spectral) and isinstance(manifold, Stiefel):
        if norm.scale != "rms":
            raise UsageError(
                f"the Stiefel manifold is scaled by sqrt(d_out/d_in): spectral_scale must be "
                f"'rms', not '{norm.scale}'"
            )
        return lambda grad, weight: one_shot(grad, weight, manifold, norm)
    raise UsageError(
        f"no solver for norm '{type(norm).__name__}' on manifold '{type(manifold).__name__}'; "
        "known: any norm on euclidean, spectral on stiefel"
    )


__all__ = ["Solver", "steepest"]
