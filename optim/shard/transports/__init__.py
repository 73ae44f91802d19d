"""Transports: one file each; the table below is the only registry, the preferred one first."""

from geon.optim.shard.transports.base import Job, Letters, Message, Offer, Transport, Work
from geon.optim.shard.transports.gram import Gram
from geon.optim.shard.transports.local import Local
from geon.optim.shard.transports.norms import Norms
from geon.optim.shard.transports.owner import Owner

TRANSPORTS: dict[str, Transport] = {one.name: one for one in (Local(), Norms(), Owner(), Gram())}

__all__ = [
    "TRANSPORTS",
    "Job",
    "Letters",
    "Message",
    "Offer",
    "Transport",
    "Work",
]
