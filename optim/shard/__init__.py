"""Who holds what of each matrix, what is sent for a step, and the sending."""

from geon.optim.shard.cost import lower_bound_words
from geon.optim.shard.exchange import Exchange
from geon.optim.shard.layout import Flat, Grid, Holding, Layout, Piece, Region, holding
from geon.optim.shard.machine import MACHINES, Bytes, Machine, constant, read_machine, speed
from geon.optim.shard.matrix import Matrix, Sums
from geon.optim.shard.plan import Bucket, Plan
from geon.optim.shard.planner import make_plan
from geon.optim.shard.ranks import Placement, Ranks
from geon.optim.shard.sharding import Sharding
from geon.optim.shard.transports import TRANSPORTS, Job, Message, Transport, Work

__all__ = [
    "MACHINES",
    "TRANSPORTS",
    "Bucket",
    "Bytes",
    "Exchange",
    "Flat",
    "Grid",
    "Holding",
    "Job",
    "Layout",
    "Machine",
    "Matrix",
    "Message",
    "Piece",
    "Placement",
    "Plan",
    "Ranks",
    "Region",
    "Sharding",
    "Sums",
    "Transport",
    "Work",
    "constant",
    "holding",
    "lower_bound_words",
    "make_plan",
    "read_machine",
    "speed",
]
