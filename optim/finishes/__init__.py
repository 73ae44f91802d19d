"""Finishes of a step: one file each; the table below is the only registry."""

from geon.optim.finishes.base import Finish, Move
from geon.optim.finishes.cautious_decay import CautiousDecay
from geon.optim.finishes.even_rows import EvenRows
from geon.optim.finishes.radial_brake import RadialBrake
from geon.optim.finishes.row_cap import RowCap
from geon.optim.finishes.row_moments import RowMoments
from geon.optim.finishes.update_floor import UpdateFloor

FINISHES: dict[str, type[Finish]] = {
    "cautious_decay": CautiousDecay,
    "even_rows": EvenRows,
    "radial_brake": RadialBrake,
    "row_cap": RowCap,
    "second_moment": RowMoments,
    "update_floor": UpdateFloor,
}

__all__ = [
    "FINISHES",
    "CautiousDecay",
    "EvenRows",
    "Finish",
    "Move",
    "RadialBrake",
    "RowCap",
    "RowMoments",
    "UpdateFloor",
]
