"""Polar factors: the orthogonal part U V^T of G = U S V^T."""

from geon.optim.polar.coefficients import KELLER, POLAR_EXPRESS, TABLES, Coefficients
from geon.optim.polar.exact import polar_svd
from geon.optim.polar.iterate import Polar, polar

__all__ = [
    "KELLER",
    "POLAR_EXPRESS",
    "TABLES",
    "Coefficients",
    "Polar",
    "polar",
    "polar_svd",
]
