"""Gather -> compute -> scatter, as the plan says: the only place where optimizer tensors are sent.

A bucket is one `all_to_all_single` before its computation and one after it, with exact splits.
While a bucket is computed, the next one's first collective and the last one's second are under way.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import ExchangeError, UsageError
from geon.optim.shard.arena import Arena
from geon.optim.shard.layout import Piece
from geon.optim.shard.matrix import FP32, Job, Matrix, Transport
from geon.optim.shard.plan import Bucket, Plan
from geon.optim.shard.script import (
    Part,
    Reader,
    Script,
    carrier,
    pack_words,
    sizes_down,
    view,
    write_script,
)


class Work(Protocol):
    """The mathematics of a step; tensors of the exchange are fp32."""

    def operand(self, matrix: Matrix, index: int) -> Tensor:
        """Flat storage of this rank's part of the parameter: 0 the update, 1 the weight."""

    def solve(self, jobs: Sequence[Job], operands: tuple[Tensor, ...], rank: int) -> Tensor:
        """Results (batch, rows, cols) for a batch of matrices, or pieces, of one rule and shape."""

    def row_state(self, matrix: Matrix) -> Tensor:
        """One number a row that travels with a result; written in place on arrival."""

    def partial(self, jobs: Sequence[Job], rank: int) -> list[Tensor]:
        """This rank's sums for each job."""

    def combine(
        self, jobs: Sequence[Job], sums: Sequence[dict[int, Tensor]], rank: int
    ) -> list[dict[int, Tensor]]:
        """Coefficients for each rank that takes part, from the sums by rank."""

    def apply(self, jobs: Sequence[Job], coefficients: Sequence[Tensor], rank: int) -> None:
        """Write what follows from the coefficients."""

    def write(self, matrix: Matrix, piece: Piece, result: Tensor) -> None:
        """Take a piece of a result."""


@dataclass
class _Flight:
    """A bucket under way."""

    index: int
    bucket: Bucket
    script: Script
    sums: dict[int, Tensor] = field(default_factory=dict)
    coefficients: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By job and receiver."""
    handle: "_Handle | None" = None


@dataclass
class _Handle:
    work: dist.Work | None
    received: Tensor
    sent: Tensor
    """Kept until the collective is over."""


class Exchange:
    """Runs a plan.

    Attributes:
        plan: what is sent, decided beforehand.
        bytes_sent: bytes this rank has sent so far, counted where they are handed over.
        collectives: collectives issued so far.
    """

    def __init__(self, plan: Plan, arena: Arena | None = None) -> None:
        self.plan = plan
        self.arena = arena or Arena()
        self.bytes_sent = 0
        self.collectives = 0
        if plan.jobs and plan.ranks != self.arena.size:
            raise UsageError(
                f"the plan is for {plan.ranks} ranks, but {self.arena.size} step together"
            )
        self._check_agreement()
        rank, alone = self.arena.rank, plan.wishes.reproducible
        self._scripts = [write_script(bucket, rank, alone) for bucket in plan.buckets]

    def _check_agreement(self) -> None:
        """Compare plans across ranks before the first byte is sent.

        Raises:
            UsageError: on every rank, naming the first parameter that they planned differently.
        """
        if self.arena.group is None or self.arena.size == 1:
            return
        mine = int(self.plan.digest[:15], 16)
        bounds = torch.tensor([mine, -mine], device=self.arena.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.arena.group)
        if bounds[0].item() == -bounds[1].item():
            return
        everyone: list[dict[str, str]] = [{}] * self.arena.size
        dist.all_gather_object(everyone, self.plan.digests(), group=self.arena.group)
        names = list(dict.fromkeys(name for one in everyone for name in one))
        first = next((n for n in names if len({one.get(n) for one in everyone}) > 1), names[0])
        odd = [r for r, one in enumerate(everyone) if one.get(first) != everyone[0].get(first)]
        raise UsageError(
            f"ranks planned different exchanges: parameter '{first}' differs on rank "
            f"{', '.join(map(str, odd)) or '?'} from rank 0 (this one is {self.arena.rank}); start "
            "all ranks with one config, model and shard.* settings"
        )

    def run(
        self,
        work: Work,
        params: Collection[str] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Step every matrix of the plan, or those buckets that are of the given parameters.

        meanwhile: called once, while the first bucket travels.
        """
        landing: _Flight | None = None
        buckets = [
            (index, bucket)
            for index, bucket in enumerate(self.plan.buckets)
            if params is None or bucket.matrices[0].param in params
        ]
        flight = self._depart(*buckets[0], work) if buckets else None
        if meanwhile is not None:
            meanwhile()
        for following in [*buckets[1:], None] if buckets else []:
            assert flight is not None
            incoming = self._wait(flight, "gather")
            ahead = self._depart(*following, work) if following is not None else None
            self._compute(flight, incoming, work)
            if landing is not None:
                self._land(landing, work)
            landing, flight = flight, ahead
        if landing is not None:
            self._land(landing, work)

    # The four phases of a bucket.

    def _depart(self, index: int, bucket: Bucket, work: Work) -> _Flight:
        """Send pieces and sums to who computes."""
        flight = _Flight(index, bucket, self._scripts[index])
        script, rank = flight.script, self.arena.rank
        if script.summed:
            found = work.partial(script.summed, rank)
            flight.sums = {id(job): own for job, own in zip(script.summed, found, strict=True)}
        if not bucket.gathers:
            return flight
        parts: list[list[Part]] = [[] for _ in range(self.arena.size)]
        for receiver, job in script.sends:
            if job.summed:
                parts[receiver].append((flight.sums[id(job)], FP32))
                continue
            for operand, size in enumerate(sizes_down(job)):
                flat = work.operand(job.matrix, operand)
                for piece in job.matrix.holding.pieces[rank]:
                    parts[receiver].append((view(flat, piece), size))
        sizes = [0] * self.arena.size
        for sender, job in script.receives:
            sizes[sender] += job.bytes_down(sender)
        flight.handle = self._send(flight, "gather", parts, sizes, script.sizes[0])
        return flight

    def _compute(self, flight: _Flight, received: Tensor | None, work: Work) -> None:
        """Compute what this rank owns, and send the results off."""
        script, rank = flight.script, self.arena.rank
        incoming = _unpack(script, received)
        results: dict[int, Tensor] = {}
        for jobs in script.batches:
            operands = self._assemble(jobs, incoming, work)
            found = work.solve(jobs, operands, rank)
            for job, result in zip(jobs, found.unbind(), strict=True):
                results[id(job)] = self._round(job, result)
        for jobs in script.owned_sums:
            sums = [dict(incoming.get(id(job), {})) for job in jobs]
            for job, by_rank in zip(jobs, sums, strict=True):
                if id(job) in flight.sums:
                    by_rank[rank] = flight.sums[id(job)]
            for job, back in zip(jobs, work.combine(jobs, sums, rank), strict=True):
                for receiver, words in back.items():
                    flight.coefficients[id(job), receiver] = words
        if flight.bucket.scatters:
            self._return(flight, results, work)
        for jobs in script.batches:
            for job in jobs:
                for piece in job.matrix.holding.pieces[rank]:
                    work.write(job.matrix, piece, results[id(job)][piece.region.slices])
        self._local(script.local, work)

    def _land(self, flight: _Flight, work: Work) -> None:
        """Take results from their owners."""
        script, rank = flight.script, self.arena.rank
        received = self._wait(flight, "scatter")
        if received is not None:
            reader = Reader(received, script.sizes[1])
            for _, job in script.arrivals:
                self._take(flight, job, reader, work)
        if script.summed:
            nothing = torch.empty(0, device=self.arena.device)  # all its rows are its own
            found = [flight.coefficients.get((id(job), rank), nothing) for job in script.summed]
            work.apply(script.summed, found, rank)

    # Packing.

    def _assemble(
        self, jobs: Sequence[Job], incoming: dict[int, dict[int, Tensor]], work: Work
    ) -> tuple[Tensor, ...]:
        """Whole operands of a batch, stacked."""
        matrix, rank = jobs[0].matrix, self.arena.rank
        first = work.operand(matrix, 0)
        operands = tuple(
            first.new_empty((len(jobs), *matrix.shape)) for _ in range(matrix.operands)
        )
        for i, job in enumerate(jobs):
            for k, whole in enumerate(operands):
                target = whole[i]
                flat = work.operand(job.matrix, k)
                for piece in job.matrix.holding.pieces[rank]:
                    own = view(flat, piece)
                    target[piece.region.slices] = self._as_sent(job, own, k)
                for sender, words in incoming.get(id(job), {}).items():
                    at = k * job.matrix.holding.words[sender]
                    for piece in job.matrix.holding.pieces[sender]:
                        region = piece.region
                        block = words[at : at + region.numel].view(region.shape)
                        target[region.slices] = block
                        at += region.numel
        return operands

    def _as_sent(self, job: Job, own: Tensor, index: int) -> Tensor:
        """Own pieces are rounded like sent ones, so that every rank computes the same."""
        if job.transport is Transport.LOCAL or sizes_down(job)[index] == FP32:
            return own
        return own.bfloat16()

    def _round(self, job: Job, result: Tensor) -> Tensor:
        """The owner's own part is rounded like the parts it sends: copies must stay equal."""
        if job.transport is Transport.OWNER and job.matrix.bytes_out != FP32:
            return result.bfloat16().to(result.dtype)
        return result

    def _return(self, flight: _Flight, results: dict[int, Tensor], work: Work) -> None:
        parts: list[list[Part]] = [[] for _ in range(self.arena.size)]
        for receiver, job in flight.script.returns:
            if job.summed:
                parts[receiver].append((flight.coefficients[id(job), receiver], FP32))
                continue
            if job.matrix.row_state:
                parts[receiver].append((work.row_state(job.matrix), FP32))
            for piece in job.matrix.holding.pieces[receiver]:
                own = results[id(job)][piece.region.slices]
                parts[receiver].append((own, job.matrix.bytes_out))
        sizes = [0] * self.arena.size
        for sender, job in flight.script.arrivals:
            sizes[sender] += job.bytes_up(self.arena.rank)
        flight.handle = self._send(flight, "scatter", parts, sizes, flight.script.sizes[1])

    def _take(self, flight: _Flight, job: Job, reader: Reader, work: Work) -> None:
        """Take what came for a job."""
        rank = self.arena.rank
        if job.summed:
            words = reader.take(job.matrix.sum_words(rank)[1], FP32)
            flight.coefficients[id(job), rank] = words
            return
        if job.matrix.row_state:
            work.row_state(job.matrix).copy_(reader.take(job.matrix.shape[0], FP32))
        for piece in job.matrix.holding.pieces[rank]:
            words = reader.take(piece.region.numel, job.matrix.bytes_out)
            work.write(job.matrix, piece, words.view(piece.region.shape))

    def _local(self, jobs: Sequence[Job], work: Work) -> None:
        """Step what needs nothing from others, pieces of equal shapes together."""
        rank = self.arena.rank
        alike: dict[object, list[tuple[Job, Piece]]] = defaultdict(list)
        for job in jobs:
            for piece in job.matrix.holding.pieces[rank]:
                alone = id(job) if self.plan.wishes.reproducible else 0
                key = (job.matrix.rule, job.matrix.shape, job.matrix.scale, piece.region.shape)
                alike[key, alone].append((job, piece))
        for members in alike.values():
            matrix = members[0][0].matrix
            operands = tuple(
                torch.stack([view(work.operand(job.matrix, k), piece) for job, piece in members])
                for k in range(matrix.operands)
            )
            found = work.solve([job for job, _ in members], operands, rank)
            for (job, piece), result in zip(members, found.unbind(), strict=True):
                work.write(job.matrix, piece, result)

    # Sending.

    def _send(
        self,
        flight: _Flight,
        phase: str,
        parts: Sequence[Sequence[Part]],
        receive_bytes: Sequence[int],
        word_sizes: frozenset[int],
    ) -> _Handle:
        """Start one all_to_all_single with exact splits."""
        dtype, device = carrier(word_sizes), self.arena.device
        unit = dtype.itemsize
        send_sizes = [sum(t.numel() * size // unit for t, size in one) for one in parts]
        sent = pack_words([part for one in parts for part in one], dtype, device)
        sizes = [size // unit for size in receive_bytes]
        received = torch.empty(sum(sizes), dtype=dtype, device=device)
        self.bytes_sent += sent.numel() * unit
        self.collectives += 1
        try:
            work = dist.all_to_all_single(
                received, sent, sizes, send_sizes, group=self.arena.group, async_op=True
            )
        except RuntimeError as error:
            raise self._failure(flight, phase, error) from error
        return _Handle(work, received, sent)

    def _wait(self, flight: _Flight, phase: str) -> Tensor | None:
        """What a collective brought; None when none is under way."""
        handle, flight.handle = flight.handle, None
        if handle is None:
            return None
        try:
            if handle.work is not None:
                handle.work.wait()
        except RuntimeError as error:
            raise self._failure(flight, phase, error) from error
        return handle.received

    def _failure(self, flight: _Flight, phase: str, error: Exception) -> ExchangeError:
        reason = str(error).strip().splitlines()[0]
        return ExchangeError(
            f"rank {self.arena.rank}: the {phase} (all_to_all_single) of bucket {flight.index} of "
            f"{len(self.plan.buckets)} ({flight.bucket.describe()}) failed: another rank ended, or "
            f"took longer than parallel.timeout_seconds. {reason}"
        )


def _unpack(script: Script, received: Tensor | None) -> dict[int, dict[int, Tensor]]:
    """Job -> sender -> its words, of both operands one after the other, in fp32."""
    incoming: dict[int, dict[int, Tensor]] = defaultdict(dict)
    if received is None:
        return incoming
    reader = Reader(received, script.sizes[0])
    for sender, job in script.receives:
        words = job.words_down(sender)
        parts = [reader.take(words, size) for size in sizes_down(job)]
        incoming[id(job)][sender] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return incoming
