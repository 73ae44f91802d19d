"""Polar factors: the orthogonal part U V^T of G = U S V^T."""

from geon.optim.polar.coefficients import CUBIC, KELLER, POLAR_EXPRESS, TABLES, Coefficients
from geon.optim.polar.exact import polar_svd
from geon.optim.polar.gram import inverse_sqrt, polar_gram
from geon.optim.polar.interval import bounds, steps_for
from geon.optim.polar.iterate import Polar, polar
from geon.optim.polar.minimax import minimax
from geon.optim.polar.precision import Precision, ieee_products

__all__ = [
    "CUBIC",
    "KELLER",
    "POLAR_EXPRESS",
    "TABLES",
    "Coefficients",
    "Polar",
    "Precision",
    "bounds",
    "ieee_products",
    "inverse_sqrt",
    "minimax",
    "polar",
    "polar_gram",
    "polar_svd",
    "steps_for",
]
