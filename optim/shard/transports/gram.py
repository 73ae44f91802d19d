from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from geon.optim.costs import Cost
from geon.optim.shard.matrix import FP32, Matrix
from geon.optim.shard.transports.base import (
    Job,
    Letters,
    Message,
    Offer,
    Transport,
    Work,
    batches,
    senders,
    sends,
    to_owner,
)


class Gram(Transport):
    """Sums over the long side go to one rank, coefficients of the short side come back.

    Each rank must store the whole short side of what it stores at all. Where a rule has no such
    form, or a finish that looks at the direction, the matrix goes by its owner.
    """

    name = "gram"

    def offer(self, matrix: Matrix, reproducible: bool) -> Offer:
        """Offer to take a matrix whose rule has sums, and whose long side the ranks cut."""
        if reproducible or matrix.fits or matrix.sums is None or matrix.sums.kind != self.name:
            return Offer.NO
        short = 1 if matrix.shape[0] >= matrix.shape[1] else 0
        return Offer.MAYBE if matrix.holding.spans(short) else Offer.NO

    def down(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of sums, to the owner."""
        assert matrix.sums is not None
        words = ((matrix.sums.down, FP32),)
        return to_owner(matrix, owner, lambda _: words)

    def up(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of coefficients, to every rank that stores some of the matrix."""
        assert matrix.sums is not None
        words = ((matrix.sums.up, FP32),)
        return (Message(owner, rank, words) for rank in sorted(matrix.holding.of) if rank != owner)

    def owner_cost(self, matrix: Matrix) -> Cost:
        """Cost on the owner, from sums to coefficients."""
        return matrix.sums.owner_cost if matrix.sums else Cost()

    def shared_cost(self, matrix: Matrix) -> Cost:
        """Cost of the products that give the sums and that apply the coefficients."""
        return matrix.sums.shared_cost if matrix.sums else Cost()

    def work_bytes(self, matrix: Matrix, owner: int, rank: int) -> int:
        """Scratch bytes: the own part of the result, and on the owner sums and coefficients."""
        assert matrix.sums is not None
        own = (matrix.sums.down + matrix.sums.up) * FP32 if rank == owner else 0
        return own + matrix.holding.words[rank] * FP32

    def depart(self, jobs: Sequence[Job], work: Work) -> Letters:
        """Return the sums of this rank's rows."""
        outbox: Letters = {}
        for batch in _alike((job for job in jobs if sends(job, work.rank)), work):
            matrix = batch[0].matrix
            update, weight = _slabs(batch, work)
            sums = work.gram_form(matrix).partial(update, _unit(weight, matrix), matrix.shape)
            for job, own in zip(batch, sums.unbind(), strict=True):
                outbox[job, job.owner] = [own]
        return outbox

    def compute(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> Letters:
        """Return the coefficients; sums are added in the order of ranks."""
        outbox: Letters = {}
        mine = (job for job in jobs if job.owner == work.rank)
        for batch in batches(mine, work.alone, lambda job: senders(job, inbox)):
            matrix = batch[0].matrix
            stacked = torch.stack(
                [
                    torch.stack([inbox[job, rank][0] for job in batch])
                    for rank in senders(batch[0], inbox)
                ]
            )
            words, fell_back = work.gram_form(matrix).combine(
                stacked, matrix.shape, work.lr(matrix)
            )
            if fell_back is not None:
                work.count_fallbacks(fell_back)
            for job, own in zip(batch, words.unbind(), strict=True):
                for rank in job.matrix.holding.of:
                    outbox[job, rank] = [own]
        return outbox

    def land(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> None:
        """Apply the coefficients to this rank's rows."""
        held = [job for job in jobs if (job, job.owner) in inbox]
        for batch in _alike((job for job in held if work.moves(job.matrix)), work):
            matrix = batch[0].matrix
            update, weight = _slabs(batch, work)
            words = torch.stack([inbox[job, job.owner][0] for job in batch])
            unit = _unit(weight, matrix)
            found = work.gram_form(matrix).apply(words, update, unit, matrix.shape)
            if matrix.scale != 1.0:  # a weight that did not move is not rounded
                scaled = found * matrix.scale
                found = scaled if weight is None else weight.where(found == unit, scaled)
            wide = matrix.shape[0] < matrix.shape[1]
            pairs = zip(batch, (found.mT if wide else found).unbind(), strict=True)
            work.write((job.matrix, _own(job, work), result) for job, result in pairs)


def _own(job: Job, work: Work):  # type: ignore[no-untyped-def]
    return job.matrix.holding.pieces[work.rank][0]


def _alike(jobs: Iterable[Job], work: Work) -> list[list[Job]]:
    """Jobs of one rule and shape whose parts on this rank have one shape."""
    return batches(jobs, work.alone, lambda job: _own(job, work).region.shape)


def _slabs(jobs: Sequence[Job], work: Work) -> tuple[Tensor, Tensor | None]:
    """This rank's parts of a batch, updates and weights, oriented long x short."""
    matrix = jobs[0].matrix
    stacked = [
        torch.stack([work.operand(job.matrix, k, _own(job, work)) for job in jobs])
        for k in range(matrix.operands)
    ]
    if matrix.shape[0] < matrix.shape[1]:
        stacked = [one.mT for one in stacked]
    return stacked[0], stacked[1] if matrix.operands == 2 else None


def _unit(weight: Tensor | None, matrix: Matrix) -> Tensor | None:
    """Weights over the scale of their matrix."""
    return weight if weight is None or matrix.scale == 1.0 else weight / matrix.scale
