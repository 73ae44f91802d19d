"""Polar Express coefficients computed from scratch, for any smallest singular value."""

import math
from collections.abc import Sequence
from functools import lru_cache

from geon.optim.polar.coefficients import Coefficients, Triple

# The value behind the published table: Amsel et al., arXiv 2505.16932, appendix G.
CUSHION = 0.02407327424182761
# Closer ends than this make the alternation drown in rounding; the limit is exact to 1e-11 there.
_SAME_END = 5e-6
_SIGNS = (1.0, -1.0, 1.0, -1.0)


@lru_cache(maxsize=256)
def minimax(lower: float, steps: int, cushion: float = CUSHION) -> Coefficients:
    """Compose best odd quintics greedily: each is optimal on the interval the last one left.

    The exact optimum for a small `lower` sends some large values down to p(lower), where bf16
    loses them. Hence the cushion: a step is optimal on [max(l, cushion u), u], then rescaled
    so that its values on the true [l, u] are centred on 1 again.

    Args:
        lower: smallest singular value, the largest being 1.
        steps: number of triples.
        cushion: smallest ratio of the ends that a step is designed for.

    Returns:
        A table of `steps` triples with safety 1.01. Its first k triples do not depend on `steps`.

    Raises:
        ValueError: lower outside (0, 1] (optim.polar.lower), steps below 1 (optim.polar.steps).

    Source: Amsel et al., arXiv 2505.16932, theorem 3.1 and appendix G; minimax(1e-3, 8) is the
        published table.
    Cost: microseconds in float64, no tensors.
    """
    if not 0 < lower <= 1:
        raise ValueError(f"polar lower must be above 0, at most 1, got {lower} (optim.polar.lower)")
    if steps < 1:
        raise ValueError(f"polar steps must be at least 1, got {steps} (optim.polar.steps)")
    low, high = lower, 1.0
    triples = []
    for _ in range(steps):
        triple = best_quintic(max(low, cushion * high), high)
        scale = 2 / (_value(triple, low) + _value(triple, high))
        triple = (scale * triple[0], scale * triple[1], scale * triple[2])
        triples.append(triple)
        low = _value(triple, low)
        high = 2 - low
    source = f"Amsel et al., arXiv 2505.16932, for singular values in [{lower:g}, 1]"
    return Coefficients("minimax", source, tuple(triples), safety=1.01)


def best_quintic(low: float, high: float) -> Triple:
    """Return the odd quintic closest to 1 on [low, high] in the largest error.

    Remez: the error alternates 1 - p = E, -E, E, -E at both ends and the two critical points of
    p; interpolate, move the inner two points to the critical points, repeat.
    """
    if low / high >= 1 - _SAME_END:
        return (15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5)
    inner = ((3 * low + high) / 4, (low + 3 * high) / 4)  # exact as low -> high
    error = math.inf
    for _ in range(100):
        (a, b, c), new = _alternate((low, *inner, high))
        inner = _critical(a, b, c)
        if abs(new - error) <= 1e-15:
            break
        error = new
    return (a, b, c)


def _alternate(points: Sequence[float]) -> tuple[Triple, float]:
    """Odd quintic with 1 - p = E, -E, E, -E at four points, and E.

    With y = x^2, p(x)/x is quadratic in y and equals (1 - sign E)/x at the points. Its third
    divided difference is zero, which gives E without solving a badly conditioned 4 x 4 system.
    """
    y = [x * x for x in points]
    ones = _divided([1 / x for x in points], y)
    signs = _divided([s / x for s, x in zip(_SIGNS, points, strict=True)], y)
    error = ones[3] / signs[3]
    h0, h1, c = (ones[k] - error * signs[k] for k in range(3))
    return (h0 - y[0] * (h1 - y[1] * c), h1 - c * (y[0] + y[1]), c), error


def _divided(values: list[float], nodes: list[float]) -> list[float]:
    """Newton's divided differences f[y0], f[y0, y1], f[y0, y1, y2], ..."""
    leading = [values[0]]
    for order in range(1, len(nodes)):
        values = [
            (values[i + 1] - values[i]) / (nodes[i + order] - nodes[i])
            for i in range(len(values) - 1)
        ]
        leading.append(values[0])
    return leading


def _critical(a: float, b: float, c: float) -> tuple[float, float]:
    """Positive zeros of p' of an odd quintic p, smaller first, for b < 0 < a, c."""
    root = math.sqrt(9 * b * b - 20 * a * c)
    return math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))


def _value(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))
