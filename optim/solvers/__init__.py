"""Steepest descent for a pair (norm, manifold): `argmax <grad, A>`, A tangent, norm at most 1."""

from geon.errors import UsageError
from geon.optim.manifolds import Manifold, Stiefel
from geon.optim.norms import Norm, Spectral
from geon.optim.solvers.base import Solution, Solver
from geon.optim.solvers.certificate import Certificate, certify
from geon.optim.solvers.closed_form import KNOWN, find
from geon.optim.solvers.stiefel_spectral import Ladder, StiefelSpectral
from geon.optim.solvers.sums import GramForm, RowForm, gram_form


def steepest(norm: Norm, manifold: Manifold, ladder: Ladder | None = None) -> Solver:
    """Choose the solver for a pair.

    ladder: for the spectral norm on Stiefel, where there is a choice.

    Raises:
        UsageError: no solver is known for the pair.
    """
    if isinstance(norm, Spectral) and manifold.constrains and norm.scale != "rms":
        raise UsageError(
            f"manifolds are scaled by sqrt(d_out/d_in): spectral_scale must be 'rms' on "
            f"{type(manifold).__name__}, not '{norm.scale}'"
        )
    if isinstance(norm, Spectral) and isinstance(manifold, Stiefel):
        return StiefelSpectral(norm, manifold, ladder or Ladder())
    if (solver := find(norm, manifold)) is not None:
        return solver
    raise UsageError(
        f"no solver for norm '{type(norm).__name__}' on manifold '{type(manifold).__name__}'; "
        f"known: {KNOWN}"
    )


__all__ = [
    "Certificate",
    "GramForm",
    "Ladder",
    "RowForm",
    "Solution",
    "Solver",
    "certify",
    "gram_form",
    "steepest",
]
