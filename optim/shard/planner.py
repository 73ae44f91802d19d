"""Which transport each matrix takes, who owns it, and what travels together. No torch in here."""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

from geon.optim.norms import Reach
from geon.optim.shard.matrix import Job, Matrix, Transport
from geon.optim.shard.plan import Bucket, Load, Plan, add
from geon.optim.shard.wishes import Wishes


def candidates(matrix: Matrix, wishes: Wishes) -> list[Transport]:
    """Transports that a matrix may take, the preferred one first."""
    alone = all(len(ranks) == 1 for ranks in matrix.holding.copies)
    if matrix.fits and (alone or matrix.reach is not Reach.MATRIX):
        return [Transport.LOCAL]
    if matrix.can_sum and matrix.sums is not None and matrix.sums.transport is Transport.NORMS:
        return [Transport.NORMS]
    if wishes.transport == "owner":
        return [Transport.OWNER]
    if matrix.fits and wishes.transport != "auto":
        return [Transport.LOCAL]
    if wishes.transport == "gram":
        return [Transport.GRAM if matrix.can_sum else Transport.OWNER]
    if wishes.transport == "allgather":
        return [Transport.ALLGATHER]
    found = [Transport.LOCAL, Transport.OWNER] if matrix.fits else [Transport.OWNER]
    if wishes.reproducible:
        return found
    if matrix.can_sum and not matrix.fits:
        found.append(Transport.GRAM)
    if not matrix.fits:
        found.append(Transport.ALLGATHER)
    return found


def make_plan(
    matrices: Sequence[Matrix], wishes: Wishes | None = None, separate: bool = False
) -> Plan:
    """Choose transports and owners, and fill buckets.

    Matrices of equal shape, layout and rule take the same transport. Owners are chosen longest
    processing time first (R. L. Graham, 1969) over all ranks: who stores less of a matrix than
    others is charged for the bytes. Buckets follow that order, so each is balanced and holds equal
    shapes together.

    separate: a bucket for each parameter, in the given order.
    """
    wishes = wishes or Wishes()
    ranks = max((m.layout.ranks for m in matrices), default=1)
    choice = _choose(matrices, ranks, wishes)
    jobs = _assign(matrices, choice, ranks, wishes)
    if separate:
        of: dict[str, list[Job]] = {matrix.param: [] for matrix in matrices}
        for job in jobs:
            of[job.matrix.param].append(job)
        return Plan(tuple(Bucket(tuple(own), ranks) for own in of.values()), ranks, wishes)
    still = [job for job in jobs if job.transport is Transport.LOCAL]
    moving = [job for job in jobs if job.transport is not Transport.LOCAL]
    buckets = _fill(moving, ranks, wishes.max_buffer_mb * 2**20)
    if still:
        buckets.append(Bucket(tuple(still), ranks))
    return Plan(tuple(buckets), ranks, wishes)


Kind = tuple[Any, ...]


def _kind(matrix: Matrix) -> Kind:
    """What matrices have in common that take the same transport."""
    return matrix.layout, matrix.shape, matrix.rule, matrix.fits, matrix.can_sum


def _choose(matrices: Sequence[Matrix], ranks: int, wishes: Wishes) -> dict[Kind, Transport]:
    """Transport of each kind; by time, one kind is changed after the other while that helps."""
    kinds: dict[Kind, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(_kind(matrix), []).append(matrix)
    options = {kind: candidates(members[0], wishes) for kind, members in kinds.items()}
    if wishes.objective == "bytes":
        return {
            kind: min(
                options[kind],
                key=lambda t: sum(Job(m, t, _holders(m)[0]).traffic.total for m in kinds[kind]),
            )
            for kind in kinds
        }
    choice = {kind: found[0] for kind, found in options.items()}
    open_kinds = [kind for kind in kinds if len(options[kind]) > 1]
    prices = {
        (kind, t): _price(kinds[kind], t, ranks, wishes) for kind in kinds for t in options[kind]
    }
    best = _predict(prices, choice, ranks, wishes) if open_kinds else 0.0
    for _ in range(2):
        for kind in open_kinds:
            for transport in options[kind]:
                trial = {**choice, kind: transport}
                seconds = _predict(prices, trial, ranks, wishes)
                if seconds < 0.98 * best:  # not for a few percent of a rough prediction
                    choice, best = trial, seconds
    return choice


class _Price(NamedTuple):
    """What a kind of matrices costs by one transport.

    Attributes:
        copies: how many there are of the kind.
        owned: whether each has an owner.
        gather, scatter: bytes that all ranks send for one of them, each way.
        owner_seconds: on its owner.
        seconds: on every rank.
    """

    copies: int
    owned: bool
    gather: int
    scatter: int
    owner_seconds: float
    seconds: float


def _price(members: Sequence[Matrix], transport: Transport, ranks: int, wishes: Wishes) -> _Price:
    machine = wishes.machine
    job = Job(members[0], transport, _holders(members[0])[0])
    rate = machine.half_flops if job.half else machine.flops
    others = job.total_flops - job.owner_flops
    return _Price(
        len(members),
        job.scatters,
        sum(job.traffic.gather_sent.values()),
        sum(job.traffic.scatter_sent.values()),
        job.owner_flops / rate,
        others / ranks / rate,
    )


def _predict(
    prices: dict[tuple[Kind, Transport], _Price],
    choice: dict[Kind, Transport],
    ranks: int,
    wishes: Wishes,
) -> float:
    """Seconds of a step with everything in one bucket, and a latency more for each full buffer.

    Each rank's share of what travels, or all that its busiest owner receives and sends.
    """
    chosen = [prices[pair] for pair in choice.items()]
    owned = [p for p in chosen if p.owned for _ in range(p.copies)]
    heap = [(0.0, 0.0, 0.0, rank) for rank in range(min(ranks, max(1, len(owned))))]
    for price in sorted(owned, key=lambda p: -p.owner_seconds):
        seconds, gather, scatter, rank = heapq.heappop(heap)
        load = (seconds + price.owner_seconds, gather + price.gather, scatter + price.scatter)
        heapq.heappush(heap, (*load, rank))
    everyone = sum(p.copies * p.gather for p in chosen), sum(p.copies * p.scatter for p in chosen)
    before = max(everyone[0] / ranks, max(load[1] for load in heap))
    after = max(everyone[1] / ranks, max(load[2] for load in heap))
    machine = wishes.machine
    fills = 1 + (before + after) / (wishes.max_buffer_mb * 2**20)
    latency = machine.latency * fills * ((before > 0) + (after > 0))
    work = max(load[0] for load in heap) + sum(p.copies * p.seconds for p in chosen)
    return latency + (before + after) / machine.bandwidth + work


def _holders(matrix: Matrix) -> list[int]:
    """Ranks that store most of a matrix: as owners, they need the least sent."""
    most = max(matrix.holding.words)
    return [rank for rank, words in enumerate(matrix.holding.words) if words == most]


def _assign(
    matrices: Sequence[Matrix], choice: dict[Kind, Transport], ranks: int, wishes: Wishes
) -> list[Job]:
    """Owners by longest processing time first; equal costs by shape, then in the given order."""
    machine = wishes.machine
    loads, jobs, owned = [0.0] * ranks, [], []
    for matrix in matrices:
        transport = choice[_kind(matrix)]
        job = Job(matrix, transport, _holders(matrix)[0])
        if job.scatters:
            rate = machine.half_flops if job.half else machine.flops
            owned.append((job, job.owner_flops / rate))
            continue
        jobs.append(job)
        if transport is Transport.LOCAL:
            for rank in matrix.holding.of:
                loads[rank] += job.flops(rank) / machine.flops
    owned.sort(key=lambda pair: (-pair[1], pair[0].matrix.shape))
    for job, cost in owned:
        owner = _least_loaded(job.matrix, loads, wishes)
        loads[owner] += cost
        jobs.append(Job(job.matrix, job.transport, owner))
    return jobs


def _least_loaded(matrix: Matrix, loads: Sequence[float], wishes: Wishes) -> int:
    """The owner: by time, missing words delay; by bytes, only those who miss least may own."""
    words = matrix.holding.words
    most = max(words)
    if wishes.objective == "bytes":
        return min(_holders(matrix), key=lambda r: (loads[r], r))
    per_word = (matrix.bytes_in + matrix.bytes_out) / wishes.machine.bandwidth
    return min(range(len(loads)), key=lambda r: (loads[r] + (most - words[r]) * per_word, r))


def _fill(jobs: Sequence[Job], ranks: int, limit: float) -> list[Bucket]:
    """Cut the jobs, in their order, into buckets of bounded scratch."""
    buckets: list[list[Job]] = []
    loads: list[Load] = []
    for job in jobs:
        own = [Load() for _ in range(ranks)]
        add(own, job)
        if buckets:
            most = max(load.buffer + more.buffer for load, more in zip(loads, own, strict=True))
            turn = job.scatters and all(job.owner != other.owner for other in buckets[-1])
            if most <= limit or turn:
                buckets[-1].append(job)
                add(loads, job)
                continue
        buckets.append([job])
        loads = own
    return [Bucket(tuple(members), ranks) for members in buckets]
