"""Norms: one file each; the table below is the only registry."""

from geon.optim.norms.base import Norm, Reach
from geon.optim.norms.frobenius import Frobenius
from geon.optim.norms.rms import RMS
from geon.optim.norms.rows import ColNorm, RowNorm, RowWise
from geon.optim.norms.sign import Sign
from geon.optim.norms.spectral import Spectral

NORMS: dict[str, type[Norm]] = {
    "colnorm": ColNorm,
    "frobenius": Frobenius,
    "rms": RMS,
    "rownorm": RowNorm,
    "sign": Sign,
    "spectral": Spectral,
}

__all__ = [
    "NORMS",
    "RMS",
    "ColNorm",
    "Frobenius",
    "Norm",
    "Reach",
    "RowNorm",
    "RowWise",
    "Sign",
    "Spectral",
]
