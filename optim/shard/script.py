"""What one rank does in one bucket, worked out once from the plan; and how words are packed."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geon.optim.shard.layout import Piece
from geon.optim.shard.matrix import FP32, Job, Transport
from geon.optim.shard.plan import Bucket


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
    sizes: tuple[frozenset[int], frozenset[int]]
    """Bytes of the words that travel, each way."""


def write_script(bucket: Bucket, rank: int, alone: bool) -> Script:
    """Work out what `rank` does. alone: matrices are computed one by one."""
    everyone = range(bucket.ranks)
    sends: list[_Found] = []
    receives: list[_Found] = []
    returns: list[_Found] = []
    arrivals: list[_Found] = []
    for order, job in enumerate(bucket.jobs):
        held, all_gather = job.matrix.holding, job.transport is Transport.ALLGATHER
        mine = held.of.get(rank)
        if mine is not None and job.transport is not Transport.LOCAL and job.bytes_down(rank):
            for receiver in everyone if all_gather else (job.owner,):
                wants = not all_gather or receiver in held.of or job.matrix.row_state
                if wants and receiver not in mine and held.source(mine, receiver) == rank:
                    sends.append((receiver, order, job))
        for copies in job.gathers(rank):
            if job.bytes_down(sender := held.source(copies, rank)):
                receives.append((sender, order, job))
        if job.scatters and job.owner == rank:
            others = (r for r in everyone if r != rank and job.bytes_up(r))
            returns += [(r, order, job) for r in others]
        elif job.scatters and job.bytes_up(rank):
            arrivals.append((job.owner, order, job))
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
        batches[m.rule, m.shape, m.scale, i if alone else 0].append(job)
    summed = [job for job in bucket.jobs if job.summed]
    owned: dict[object, list[Job]] = defaultdict(list)
    for job in summed:
        if job.owner == rank:
            owned[job.matrix.rule, job.matrix.shape, job.matrix.scale, job.transport].append(job)
    moving = [job for job in bucket.jobs if job.transport is not Transport.LOCAL]
    return Script(
        _in_order(sends),
        _in_order(receives),
        _in_order(returns),
        _in_order(arrivals),
        [job for job in summed if rank in job.matrix.holding.of],
        list(batches.values()),
        list(owned.values()),
        [job for job in bucket.jobs if job.transport is Transport.LOCAL],
        (
            frozenset(size for job in moving for size in sizes_down(job)),
            frozenset(size for job in moving for size in sizes_up(job)),
        ),
    )


_Found = tuple[int, int, Job]
"""The other rank, the place in the bucket, the job."""


def _in_order(found: list[_Found]) -> list[tuple[int, Job]]:
    """By the other rank, then by the place in the bucket: as both sides pack."""
    return [(rank, job) for rank, _, job in sorted(found, key=lambda one: one[:2])]


def view(flat: Tensor, piece: Piece) -> Tensor:
    """A piece of a rank's flat storage as a matrix; no copy."""
    offset = flat.storage_offset() + piece.offset
    return flat.as_strided(piece.region.shape, (piece.stride, 1), offset)


def sizes_down(job: Job) -> tuple[int, ...]:
    """Bytes of a word of each operand on the way to who computes: the update, then the weight."""
    if job.summed:
        return (FP32,)
    return (job.matrix.wire_bytes, FP32)[: job.matrix.operands]


def sizes_up(job: Job) -> tuple[int, ...]:
    """Bytes of the words that an owner sends: results, numbers of rows."""
    if not job.scatters:
        return ()
    rows = (FP32,) if job.matrix.row_state else ()
    return (FP32,) if job.summed else (job.matrix.bytes_out, *rows)


Part = tuple[Tensor, int]
"""A tensor and the bytes of its words on the wire."""


def pack_words(parts: Sequence[Part], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All parts in one flat buffer. Where the buffer is of bf16, an fp32 word is two of them."""
    if not parts:
        return torch.empty(0, dtype=dtype, device=device)
    if all(size == dtype.itemsize for _, size in parts):  # one conversion instead of many
        return torch.cat([t.reshape(-1) for t, _ in parts]).to(dtype)
    flat = [t.reshape(-1).to(torch.bfloat16 if size == 2 else torch.float32) for t, size in parts]
    return torch.cat([t if t.dtype == dtype else t.contiguous().view(dtype) for t in flat])


def carrier(sizes: frozenset[int]) -> torch.dtype:
    """Dtype of a buffer that holds words of these sizes."""
    return torch.bfloat16 if 2 in sizes else torch.float32


class Reader:
    """Reads a received buffer word by word, as fp32."""

    def __init__(self, received: Tensor, sizes: frozenset[int]) -> None:
        """sizes: of the words in it."""
        whole = sizes <= {2}  # one conversion instead of many
        self._buffer = received.float() if whole else received
        self._halves = received.dtype == torch.bfloat16 and not whole
        self._at = 0

    def take(self, words: int, size: int) -> Tensor:
        """The next words, of `size` bytes each."""
        units = words * size // 2 if self._halves else words
        part = self._buffer[self._at : self._at + units]
        self._at += units
        if self._halves and size == FP32:
            part = part.clone().view(torch.float32)  # aligned by the copy
        return part.float()
