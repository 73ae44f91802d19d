"""Step sizes of hidden matrices from the modular norm: how a network's rate is shared out."""

import math
from collections.abc import Collection

from geon.errors import UsageError
from geon.optim.modular.atoms import Linear
from geon.optim.modular.nodes import Network
from geon.optim.modular.norm import ModularNorm

MOST = 1000.0
"""Largest ratio of two step sizes. Above it early layers would not train; sums of 500 branches of
one stream that is normalised stay below."""


def step_factors(network: Network, names: Collection[str]) -> dict[str, float]:
    """Factors on the step sizes of hidden matrices, by parameter; their geometric mean is 1.

    Steepest descent in the modular norm steps each matrix by 1/c in its own norm, c of the
    unit reading. That fixes their ratios. The geometric mean is set to 1, which is what flat rates
    have: with the mass of all blocks given, the geometric mean of 1/c tends to a constant as the
    depth grows (docs/theory.md), so nothing that depends on depth is lost by it.

    names: of the parameters whose rules step matrices.

    Returns: of parameters in `names` alone. Matrices that share a parameter share a factor, the
        geometric mean of theirs.

    Raises:
        UsageError: step sizes that differ by more than 1,000 times.
    """
    coefficients = ModularNorm.of(network).coefficients
    logs: dict[str, list[float]] = {}
    for key, atom in network.atoms().items():
        if isinstance(atom, Linear) and atom.norm == "spectral" and atom.param in names:
            logs.setdefault(atom.param, []).append(-math.log(coefficients[key]))
    if not logs:
        return {}
    every = [one for own in logs.values() for one in own]
    mean = sum(every) / len(every)
    found = {param: math.exp(sum(own) / len(own) - mean) for param, own in logs.items()}
    if max(found.values()) > MOST * min(found.values()):
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        raise UsageError(
            f"optim.budget=modular: '{high}' would step {found[high] / found[low]:,.0f} times as "
            f"far as '{low}', because sensitivities multiply with depth: set model.residual=scaled "
            "(with model.norm=none it keeps them at 1), or optim.budget=flat"
        )
    return found
