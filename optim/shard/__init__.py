"""Who holds what of each matrix, what is sent for a step, and the sending."""

from geon.optim.shard.exchange import Exchange, locate
from geon.optim.shard.layout import ColShard, Layout, Region, Replicated, RowShard
from geon.optim.shard.plan import Bucket, Matrix, Plan, Transport, make_plan

__all__ = [
    "Bucket",
    "ColShard",
    "Exchange",
    "Layout",
    "Matrix",
    "Plan",
    "Region",
    "Replicated",
    "RowShard",
    "Transport",
    "locate",
    "make_plan",
]
