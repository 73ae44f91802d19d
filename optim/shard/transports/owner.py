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
    sends,
    to_owner,
)


class Owner(Transport):
    """One rank receives the whole matrix, computes, and sends each rank its part of the result."""

    name = "owner"

    def offer(self, matrix: Matrix, reproducible: bool) -> Offer:
        """Offer to take any matrix."""
        return Offer.MAYBE

    def down(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of the pieces of each operand, to the owner."""

        def words(rank: int) -> tuple[tuple[int, int], ...]:
            return tuple((matrix.holding.words[rank], width) for width in matrix.words_in)

        return to_owner(matrix, owner, words)

    def up(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages of row states to every rank, of the result's pieces to those who store some."""
        states = ((matrix.state_rows, FP32),) * matrix.row_states
        for rank, count in enumerate(matrix.holding.words):
            if rank != owner and (count or states):
                yield Message(owner, rank, (*states, (count, matrix.bytes_out)))

    def owner_cost(self, matrix: Matrix) -> Cost:
        """Cost of the whole step, on the owner."""
        return matrix.cost

    def work_bytes(self, matrix: Matrix, owner: int, rank: int) -> int:
        """Scratch bytes: whole operands and the result, on the owner."""
        whole = matrix.shape[0] * matrix.shape[1] * FP32
        return whole * (matrix.operands + 1) if rank == owner else 0

    def depart(self, jobs: Sequence[Job], work: Work) -> Letters:
        """Return this rank's pieces of the operands."""
        return {
            (job, job.owner): [_pieces(job, work, k) for k in range(job.matrix.operands)]
            for job in jobs
            if job.owner != work.rank and sends(job, work.rank)
        }

    def compute(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> Letters:
        """Return directions, or new weights, of the matrices that this rank owns."""
        outbox: Letters = {}
        for batch in batches((job for job in jobs if job.owner == work.rank), work.alone):
            operands = [
                torch.stack([_assemble(job, work, inbox, k) for job in batch])
                for k in range(batch[0].matrix.operands)
            ]
            results = work.solve(batch, operands)
            if batch[0].matrix.bytes_out != FP32:  # own parts as others get theirs: copies agree
                results = results.bfloat16().to(results.dtype)
            for job, result in zip(batch, results.unbind(), strict=True):
                states = work.row_states(job.matrix)
                for message in job.up:
                    outbox[job, message.receiver] = [*states, _cut(job, result, message.receiver)]
                outbox[job, work.rank] = [_cut(job, result, work.rank)]
        return outbox

    def land(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> None:
        """Write this rank's pieces of the results."""
        entries = []
        for job in jobs:
            if (job, job.owner) not in inbox:
                continue
            *states, words = inbox[job, job.owner]
            if states:
                work.set_row_states(job.matrix, states)
            at = 0
            for piece in job.matrix.holding.pieces[work.rank]:
                part = words[at : at + piece.region.numel].view(piece.region.shape)
                entries.append((job.matrix, piece, part))
                at += piece.region.numel
        work.write(entries)


def _pieces(job: Job, work: Work, operand: int) -> Tensor:
    """This rank's entries of an operand, flat."""
    own = job.matrix.holding.pieces[work.rank]
    parts = [work.operand(job.matrix, operand, piece).reshape(-1) for piece in own]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut(job: Job, result: Tensor, rank: int) -> Tensor:
    """A rank's entries of a result, flat."""
    own = job.matrix.holding.pieces[rank]
    parts = [result[piece.region.slices].reshape(-1) for piece in own]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else result.new_empty(0)


def _assemble(job: Job, work: Work, inbox: Letters, operand: int) -> Tensor:
    """A whole operand; own pieces are rounded like sent ones, so that all owners would agree."""
    matrix, rounded = job.matrix, job.matrix.words_in[operand] != FP32
    held = matrix.holding.pieces
    if matrix.holding.is_whole and held[work.rank]:
        own = work.operand(matrix, operand, held[work.rank][0])
        return own.bfloat16().to(own.dtype) if rounded else own
    whole = None
    for piece in held[work.rank]:
        own = work.operand(matrix, operand, piece)
        whole = own.new_empty(matrix.shape) if whole is None else whole
        whole[piece.region.slices] = own.bfloat16() if rounded else own
    for message in job.down:
        words, at = inbox[job, message.sender][operand], 0
        whole = words.new_empty(matrix.shape) if whole is None else whole
        for piece in held[message.sender]:
            block = words[at : at + piece.region.numel].view(piece.region.shape)
            whole[piece.region.slices] = block
            at += piece.region.numel
    assert whole is not None
    return whole
