"""Which transport each matrix takes, who owns it, and what travels together. No torch in here."""

import heapq
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from geon.optim.shard.matrix import Matrix
from geon.optim.shard.plan import Bucket, Load, Plan, add
from geon.optim.shard.sharding import Sharding
from geon.optim.shard.transports import TRANSPORTS, Job, Offer, Transport


def candidates(matrix: Matrix, sharding: Sharding) -> list[Transport]:
    """Transports that a matrix may take, the preferred one first."""
    offers = {t.name: t.offer(matrix, sharding.reproducible) for t in TRANSPORTS.values()}
    if always := [name for name, offer in offers.items() if offer is Offer.ALWAYS]:
        return [TRANSPORTS[always[0]]]
    found = [name for name, offer in offers.items() if offer is Offer.MAYBE]
    if sharding.transport == "auto":
        return [TRANSPORTS[name] for name in found]
    chosen = sharding.transport if sharding.transport in found else found[0]
    return [TRANSPORTS[chosen]]


def make_plan(matrices: Sequence[Matrix], sharding: Sharding | None = None) -> Plan:
    """Choose transports and owners, and fill buckets.

    Matrices of equal shape, layout and route take the same transport. Owners are chosen longest
    processing time first (R. L. Graham, 1969) over all ranks: who stores less of a matrix than
    others is charged for the bytes. Buckets follow that order, so each is balanced and holds equal
    shapes together.
    """
    sharding = sharding or Sharding()
    ranks = max((m.layout.ranks for m in matrices), default=1)
    choice = _choose(matrices, ranks, sharding)
    jobs = _assign(matrices, choice, ranks, sharding)
    if sharding.by_parameter:
        of: dict[str, list[Job]] = {matrix.param: [] for matrix in matrices}
        for job in jobs:
            of[job.matrix.param].append(job)
        filled = list(of.values())
    else:
        still = [job for job in jobs if not job.transport.owned]
        moving = [job for job in jobs if job.transport.owned]
        filled = _fill(moving, ranks, sharding)
        filled += [still] if still else []
    buckets = tuple(
        Bucket(tuple(own), ranks, sharding.machine, sharding.reproducible) for own in filled
    )
    return Plan(buckets, ranks, sharding)


def _kind(matrix: Matrix, sharding: Sharding) -> Hashable:
    """Key that matrices have in common that take the same transport."""
    offers = tuple(t.offer(matrix, sharding.reproducible) for t in TRANSPORTS.values())
    return matrix.layout, matrix.kind, offers


def _choose(
    matrices: Sequence[Matrix], ranks: int, sharding: Sharding
) -> dict[Hashable, Transport]:
    """Transport of each kind; by time, one kind is changed after the other while that helps."""
    kinds: dict[Hashable, list[Matrix]] = {}
    for matrix in matrices:
        kinds.setdefault(_kind(matrix, sharding), []).append(matrix)
    options = {kind: candidates(members[0], sharding) for kind, members in kinds.items()}
    if sharding.objective == "bytes":
        return {
            kind: min(
                options[kind],
                key=lambda t: sum(Job(m, t, m.holders[0]).bytes_sent for m in kinds[kind]),
            )
            for kind in kinds
        }
    choice = {kind: found[0] for kind, found in options.items()}
    open_kinds = [kind for kind in kinds if len(options[kind]) > 1]
    if not open_kinds:
        return choice
    prices = {
        (kind, t.name): _price(kinds[kind], t, ranks, sharding)
        for kind in kinds
        for t in options[kind]
    }
    best = _predict(prices, choice, ranks, sharding)
    for _ in range(2):
        for kind in open_kinds:
            for transport in options[kind]:
                trial = {**choice, kind: transport}
                seconds = _predict(prices, trial, ranks, sharding)
                if seconds < 0.98 * best:  # not for a few percent of a rough prediction
                    choice, best = trial, seconds
    return choice


class _Price(NamedTuple):
    """What a kind of matrices costs by one transport.

    Attributes:
        copies: how many there are of the kind.
        owned: whether each has an owner.
        down, up: seconds for one rank to send all that is sent for one of them, each way.
        owner_seconds: of its owner's device.
        seconds: of every rank's device.
        operators: of a batch of the kind, or of all of them where they are computed alone.
    """

    copies: int
    owned: bool
    down: float
    up: float
    owner_seconds: float
    seconds: float
    operators: int


def _price(
    members: Sequence[Matrix], transport: Transport, ranks: int, sharding: Sharding
) -> _Price:
    machine = sharding.machine
    job = Job(members[0], transport, members[0].holders[0])
    down, up = (
        sum(machine.travel(machine.crossing(m.sender, m.receiver, m.size)) for m in messages)
        for messages in (job.down, job.up)
    )
    owner, others = job.owner_cost, job.shared_cost.batch(job.matrix.copies / ranks)
    batches = -(-len(members) // ranks) if sharding.reproducible else 1
    return _Price(
        len(members),
        transport.owned,
        down,
        up,
        machine.compute(owner, job.side),
        machine.compute(others, job.side),
        (owner.operators + others.operators) * batches,
    )


def _predict(
    prices: dict[tuple[Hashable, str], _Price],
    choice: dict[Hashable, Transport],
    ranks: int,
    sharding: Sharding,
) -> float:
    """Seconds of a step with everything in one bucket, and a latency more for each full buffer.

    Each rank's share of what travels, or all that its busiest owner receives and sends.
    """
    chosen = [prices[kind, transport.name] for kind, transport in choice.items()]
    owned = [p for p in chosen if p.owned for _ in range(p.copies)]
    heap = [(0.0, 0.0, 0.0, rank) for rank in range(min(ranks, max(1, len(owned))))]
    for price in sorted(owned, key=lambda p: -p.owner_seconds):
        seconds, down, up, rank = heapq.heappop(heap)
        load = (seconds + price.owner_seconds, down + price.down, up + price.up)
        heapq.heappush(heap, (*load, rank))
    before = max(sum(p.copies * p.down for p in chosen) / ranks, max(load[1] for load in heap))
    after = max(sum(p.copies * p.up for p in chosen) / ranks, max(load[2] for load in heap))
    machine = sharding.machine
    fills = 1 + (before + after) * machine.bandwidth / (sharding.max_buffer_mb * 2**20)
    latency = machine.latency * fills * ((before > 0) + (after > 0))
    computed = max(load[0] for load in heap) + sum(p.copies * p.seconds for p in chosen)
    return latency + before + after + machine.work(computed, sum(p.operators for p in chosen))


def _assign(
    matrices: Sequence[Matrix],
    choice: dict[Hashable, Transport],
    ranks: int,
    sharding: Sharding,
) -> list[Job]:
    """Owners by longest processing time first; equal costs by shape, then in the given order."""
    loads, jobs, owned = [0.0] * ranks, [], []
    for matrix in matrices:
        job = Job(matrix, choice[_kind(matrix, sharding)], matrix.holders[0])
        if job.transport.owned:
            owned.append((job, sharding.machine.compute(job.owner_cost, job.side)))
            continue
        jobs.append(job)
        for rank in matrix.holding.of:
            loads[rank] += sharding.machine.compute(job.cost(rank), job.side)
    owned.sort(key=lambda pair: (-pair[1], pair[0].matrix.shape))
    for job, cost in owned:
        owner = _least_loaded(job.matrix, loads, sharding)
        loads[owner] += cost
        jobs.append(Job(job.matrix, job.transport, owner))
    return jobs


def _least_loaded(matrix: Matrix, loads: Sequence[float], sharding: Sharding) -> int:
    """Owner of a matrix: by time, missing words delay; by bytes, who misses least may own."""
    words = matrix.holding.words
    most = max(words)
    if sharding.objective == "bytes":
        return min(matrix.holders, key=lambda r: (loads[r], r))
    per_word = (sum(matrix.words_in) + matrix.bytes_out) / sharding.machine.bandwidth
    return min(range(len(loads)), key=lambda r: (loads[r] + (most - words[r]) * per_word, r))


def _fill(jobs: Sequence[Job], ranks: int, sharding: Sharding) -> list[list[Job]]:
    """Cut the jobs, in their order, into buckets of bounded scratch."""
    limit, buckets = sharding.max_buffer_mb * 2**20, list[list[Job]]()
    loads: list[Load] = []
    for job in jobs:
        own = [Load() for _ in range(ranks)]
        add(own, job, sharding.machine, sharding.reproducible)
        if buckets:
            most = max(load.buffer + more.buffer for load, more in zip(loads, own, strict=True))
            turn = all(job.owner != other.owner for other in buckets[-1])
            if most <= limit or turn:
                buckets[-1].append(job)
                add(loads, job, sharding.machine, sharding.reproducible)
                continue
        buckets.append([job])
        loads = own
    return buckets
