"""Polar factors: the orthogonal part U V^T of G = U S V^T."""

from geon.optim.polar.coefficients import (
    CUBIC,
    KELLER,
    POLAR_EXPRESS,
    QUINTIC,
    TABLES,
    Coefficients,
)
from geon.optim.polar.exact import polar_svd
from geon.optim.polar.gram import inverse_sqrt
from geon.optim.polar.interval import bounds, steps_for
from geon.optim.polar.iterate import Polar, polar, polar_of_bounded
from geon.optim.polar.minimax import minimax

__all__ = [
    "CUBIC",
    "KELLER",
    "POLAR_EXPRESS",
    "QUINTIC",
    "TABLES",
    "Coefficients",
    "Polar",
    "bounds",
    "inverse_sqrt",
    "minimax",
    "polar",
    "polar_of_bounded",
    "polar_svd",
    "steps_for",
]
