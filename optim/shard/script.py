"""What one rank does in one bucket, worked out once from the plan; and how words are packed."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from geon.optim.shard.layout import Piece
from geon.optim.shard.matrix import FP32, Job, Matrix, Transport
from geon.optim.shard.plan import Bucket

SUMMED = (Transport.GRAM, Transport.NORMS)


@dataclass
class Script:
    """What this rank does in one bucket, worked out once."""

    sends: list[tuple[int, Job]]
    """(receiver, job): pieces or sums, in the order of receivers."""
    receives: list[tuple[int, Job]]
    """(sender, job), in the order of senders."""
    returns: list[tuple[int, Job]]
    """(receiver, job): results or coefficients of what this rank owns."""
    arrivals: list[tuple[int, Job]]
    summed: list[Job]
    """Jobs that this rank contributes sums to."""
    batches: list[list[Job]]
    """Jobs that this rank computes whole, alike ones together."""
    owned_sums: list[list[Job]]
    local: list[Job]
    half: tuple[bool, bool]
    """Whether 2-byte words travel, each way."""


def write_script(bucket: Bucket, rank: int, alone: bool) -> Script:
    """Work out what `rank` does. alone: matrices are computed one by one."""
    ranks = range(bucket.ranks)
    sends = [
        (receiver, job)
        for receiver in ranks
        for job in bucket.jobs
        for copies in job.gathers(receiver)
        if rank in copies
        and job.matrix.holding.source(copies, receiver) == rank
        and job.bytes_down(rank)
    ]
    wanted = [
        (job.matrix.holding.source(copies, rank), order, job)
        for order, job in enumerate(bucket.jobs)
        for copies in job.gathers(rank)
    ]
    receives = [
        (sender, job)
        for sender, _, job in sorted(wanted, key=lambda x: x[:2])
        if job.bytes_down(sender)
    ]
    returned = [job for job in bucket.jobs if job.scatters]
    returns = [
        (receiver, job)
        for receiver in ranks
        for job in returned
        if job.owner == rank and receiver != rank and job.bytes_up(receiver)
    ]
    arrivals = [
        (sender, job)
        for sender in ranks
        for job in returned
        if job.owner == sender and sender != rank and job.bytes_up(rank)
    ]
    whole = [
        job
        for job in bucket.jobs
        if (job.transport is Transport.OWNER and job.owner == rank)
        or (
            job.transport is Transport.ALLGATHER
            and (rank in job.matrix.holding.of or job.matrix.row_state)
        )
    ]
    batches: dict[object, list[Job]] = defaultdict(list)
    for i, job in enumerate(whole):
        m = job.matrix
        batches[m.rule, m.shape, m.scale, job.owner == rank, i if alone else 0].append(job)
    owned: dict[object, list[Job]] = defaultdict(list)
    for job in bucket.jobs:
        if job.transport in SUMMED and job.owner == rank:
            owned[job.matrix.rule, job.matrix.shape, job.matrix.scale, job.transport].append(job)
    moving = [job for job in bucket.jobs if job.transport not in (*SUMMED, Transport.LOCAL)]
    return Script(
        sends,
        receives,
        returns,
        arrivals,
        [j for j in bucket.jobs if j.transport in SUMMED and rank in j.matrix.holding.of],
        list(batches.values()),
        list(owned.values()),
        [j for j in bucket.jobs if j.transport is Transport.LOCAL],
        (
            any(j.matrix.wire_bytes != FP32 for j in moving),
            any(j.matrix.bytes_out != FP32 for j in moving if j.scatters),
        ),
    )


def view(flat: Tensor, piece: Piece) -> Tensor:
    """A piece of a rank's flat storage as a matrix; no copy."""
    offset = flat.storage_offset() + piece.offset
    return flat.as_strided(piece.region.shape, (piece.stride, 1), offset)


def sizes_in(matrix: Matrix) -> tuple[int, ...]:
    """Bytes of an entry of each operand on the wire: the update, then the weight."""
    return (matrix.wire_bytes, FP32)[: matrix.operands]


def narrow(tensor: Tensor, size: int) -> Tensor:
    """A flat copy in words of `size` bytes."""
    return tensor.to(torch.bfloat16 if size == 2 else torch.float32).reshape(-1)


def carried(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits of a flat tensor as words of the buffer: an fp32 word is two of bf16."""
    return tensor if tensor.dtype == dtype else tensor.contiguous().view(dtype)


def take_words(received: Tensor, at: int, words: int, size: int, half: bool) -> tuple[Tensor, int]:
    """The next words of a buffer as fp32, and the place after them."""
    units = words * size // 2 if half else words
    part = received[at : at + units]
    if half and size == FP32:
        part = part.clone().view(torch.float32)  # aligned by the copy
    return part.float(), at + units
