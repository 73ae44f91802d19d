"""Where singular values end: intervals propagated through the steps of a table."""

import math
from collections.abc import Iterable
from functools import lru_cache

from geon.optim.polar.coefficients import Coefficients, Triple
from geon.optim.polar.minimax import minimax

_MOST_STEPS = 100


def bounds(triples: Iterable[Triple], lower: float, upper: float = 1.0) -> tuple[float, float]:
    """Return the smallest interval that holds singular values in [lower, upper] after the steps.

    Exact up to fp64 rounding and the composition: each step maps an interval onto the interval
    between its values at the ends and at the critical points inside, and every value is taken.

    Raises:
        ValueError: lower above upper.
    """
    if not lower <= upper:
        raise ValueError(f"polar bounds need lower <= upper, got [{lower}, {upper}]")
    low, high = lower, upper
    for a, b, c in triples:
        inside = [x for x in _critical_points(a, b, c) if low < x < high]
        values = [x * (a + x * x * (b + x * x * c)) for x in (low, *inside, high)]
        low, high = min(values), max(values)
    return low, high


@lru_cache(maxsize=256)
def steps_for(accuracy: float, lower: float, coefficients: Coefficients | None = None) -> int:
    """Return the fewest steps after which singular values in [lower, 1] lie within `accuracy` of 1.

    In exact arithmetic: bf16 products stop at about 6e-3, fp32 ones at about 1e-6.

    Args:
        accuracy: largest |sigma - 1| allowed at the end.
        lower: smallest singular value, the largest being at most 1.
        coefficients: the table; None computes minimax(lower, steps) for each number of steps.

    Raises:
        ValueError: accuracy not positive, or out of reach of the table (optim.polar.accuracy);
            lower outside (0, 1] (optim.polar.lower).
    """
    if not accuracy > 0:
        raise ValueError(f"polar accuracy must be positive, got {accuracy} (optim.polar.accuracy)")
    if not 0 < lower <= 1:
        raise ValueError(f"polar lower must be above 0, at most 1, got {lower} (optim.polar.lower)")
    best = math.inf
    for steps in range(1, _MOST_STEPS + 1):
        table = coefficients or minimax(lower, steps)
        low, high = bounds(table.steps(steps), lower)
        best = min(best, max(1 - low, high - 1))
        if best <= accuracy:
            return steps
    raise ValueError(
        f"polar accuracy {accuracy:g} is out of reach of '{table.name}' (optim.polar.accuracy): "
        f"singular values in [{lower:.2g}, 1] come within {best:.2g} of 1 at best, "
        f"in up to {_MOST_STEPS} steps"
    )


def _critical_points(a: float, b: float, c: float) -> list[float]:
    """Real zeros of p'(x) = a + 3 b x^2 + 5 c x^4."""
    discriminant = 9 * b * b - 20 * a * c
    if discriminant < 0:
        return []
    # -b +- root cancels for small c: take the sign that adds, and the product of the zeros, a/5c.
    half = -(3 * b + math.copysign(math.sqrt(discriminant), b)) / 2
    squares = [half / (5 * c)] if c else []
    squares += [a / half] if half else []
    return [sign * math.sqrt(y) for y in squares if y > 0 for sign in (-1, 1)]
