from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from geon.optim.costs import Cost
from geon.optim.shard.layout import Interval
from geon.optim.shard.matrix import FP32, Matrix
from geon.optim.shard.transports.base import (
    Job,
    Letters,
    Message,
    Offer,
    Transport,
    Work,
    senders,
    sends,
    to_owner,
)


class Norms(Transport):
    """Row norms where ranks share rows: squares of those rows to one rank, and lengths back."""

    name = "norms"
    full_precision = True

    def offer(self, matrix: Matrix, reproducible: bool) -> Offer:
        """Offer to take a matrix whose rule needs no more than the lengths of rows."""
        found = matrix.sums is not None and matrix.sums.kind == self.name
        return Offer.ALWAYS if found and not matrix.fits else Offer.NO

    def down(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of squares and scales of the rows that a rank stores a part of."""
        assert matrix.sums is not None
        down = matrix.sums.down
        return to_owner(matrix, owner, lambda rank: ((_count(matrix, rank) * down, FP32),))

    def up(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of lengths of the rows that a rank stores a part of."""
        assert matrix.sums is not None
        for rank in sorted(matrix.holding.of):
            if rank != owner and (count := _count(matrix, rank)):
                yield Message(owner, rank, ((count * matrix.sums.up, FP32),))

    def shared_cost(self, matrix: Matrix) -> Cost:
        """Cost of squares and of scaling, both element-wise."""
        return matrix.sums.shared_cost if matrix.sums else Cost()

    def work_bytes(self, matrix: Matrix, owner: int, rank: int) -> int:
        """Scratch bytes: the own part of the direction, and on the owner sums and lengths."""
        assert matrix.sums is not None
        words = _count(matrix, rank) * (matrix.sums.down + matrix.sums.up)
        return (words if rank == owner else 0) * FP32 + matrix.holding.words[rank] * FP32

    def depart(self, jobs: Sequence[Job], work: Work) -> Letters:
        """Return the squares of this rank's parts of rows."""
        outbox: Letters = {}
        for job in jobs:
            if not sends(job, work.rank):
                continue
            form, width = work.row_form(job.matrix), (0, job.matrix.shape[1])
            parts = [
                form.partial(work.operand(job.matrix, 0, piece)).reshape(-1)
                for piece in job.matrix.holding.pieces[work.rank]
                if piece.region.cols != width
            ]
            if parts:
                outbox[job, job.owner] = [torch.cat(parts)]
        return outbox

    def compute(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> Letters:
        """Return the lengths of rows, from the sums of all ranks in the order of ranks."""
        outbox: Letters = {}
        for job in jobs:
            if job.owner != work.rank:
                continue
            matrix, there = job.matrix, senders(job, inbox)
            if not there:
                continue
            some = inbox[job, there[0]][0]
            spread = some.new_zeros(len(there), matrix.shape[0], 2)
            for i, rank in enumerate(there):
                at, words = 0, inbox[job, rank][0]
                for start, stop in _shared(matrix, rank):
                    count = 2 * (stop - start)
                    spread[i, start:stop] = words[at : at + count].view(-1, 2)
                    at += count
            lengths = work.row_form(matrix).combine(spread)
            for rank in matrix.holding.of:
                if shared := _shared(matrix, rank):
                    outbox[job, rank] = [torch.cat([lengths[a:b] for a, b in shared])]
        return outbox

    def land(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> None:
        """Scale own parts of rows by the lengths of the whole rows; whole rows by their own."""
        entries = []
        for job in jobs:
            matrix, at = job.matrix, 0
            if not work.moves(matrix):
                continue
            form, width = work.row_form(matrix), (0, matrix.shape[1])
            for piece in matrix.holding.pieces[work.rank]:
                own, lengths = work.operand(matrix, 0, piece), None
                if piece.region.cols != width:
                    count = piece.region.shape[0]
                    lengths = inbox[job, job.owner][0][at : at + count]
                    at += count
                found: Tensor = form.apply(own, lengths, matrix.shape)
                entries.append(
                    (matrix, piece, found * matrix.scale if matrix.scale != 1 else found)
                )
        work.write(entries)


def _shared(matrix: Matrix, rank: int) -> list[Interval]:
    """Intervals of a matrix's rows that `rank` stores a part of only."""
    width = (0, matrix.shape[1])
    return [p.region.rows for p in matrix.holding.pieces[rank] if p.region.cols != width]


def _count(matrix: Matrix, rank: int) -> int:
    return sum(stop - start for start, stop in _shared(matrix, rank))
