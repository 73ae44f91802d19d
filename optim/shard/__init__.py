"""Who holds what of each matrix, what is sent for a step, and the sending."""

from geon.optim.shard.arena import Arena
from geon.optim.shard.cost import MACHINES, Machine, lower_bound_words
from geon.optim.shard.exchange import Exchange, Work
from geon.optim.shard.layout import Flat, Grid, Holding, Layout, Piece, Region, holding
from geon.optim.shard.matrix import Job, Matrix, Sums, Transport
from geon.optim.shard.plan import Bucket, Plan
from geon.optim.shard.planner import make_plan
from geon.optim.shard.script import view
from geon.optim.shard.wishes import Wishes

__all__ = [
    "MACHINES",
    "Arena",
    "Bucket",
    "Exchange",
    "Flat",
    "Grid",
    "Holding",
    "Job",
    "Layout",
    "Machine",
    "Matrix",
    "Piece",
    "Plan",
    "Region",
    "Sums",
    "Transport",
    "Wishes",
    "Work",
    "holding",
    "lower_bound_words",
    "make_plan",
    "view",
]
