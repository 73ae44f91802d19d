"""What a step sends, computes and holds: buckets of jobs. Pure Python, no process group.

The plan is made before anything is sent, is printed by `mode=plan`, and the exchange follows it
to the byte.
"""

import hashlib
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from geon.optim.shard.cost import lower_bound_words, seconds
from geon.optim.shard.machine import Bytes, Machine
from geon.optim.shard.matrix import Matrix
from geon.optim.shard.sharding import Sharding
from geon.optim.shard.transports import Job


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together: one collective each way, or none when all are local."""

    jobs: tuple[Job, ...]
    ranks: int
    machine: Machine
    alone: bool = False

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Matrices of the bucket, one a job."""
        return tuple(job.matrix for job in self.jobs)

    @cached_property
    def params(self) -> frozenset[str]:
        """Names of the parameters that the bucket holds matrices of."""
        return frozenset(matrix.param for matrix in self.matrices)

    @cached_property
    def loads(self) -> list["Load"]:
        """What each rank sends, computes and holds in the bucket."""
        loads = [Load() for _ in range(self.ranks)]
        for job in self.jobs:
            add(loads, job, self.machine, self.alone)
        return loads

    @cached_property
    def gathers(self) -> bool:
        """Whether anything of the bucket travels before its computation."""
        return any(job.down for job in self.jobs)

    @cached_property
    def scatters(self) -> bool:
        """Whether anything of the bucket travels after its computation."""
        return any(job.up for job in self.jobs)

    @property
    def collectives(self) -> int:
        """Collectives that the bucket takes in one step: at most one each way."""
        return int(self.gathers) + int(self.scatters)

    @property
    def phases(self) -> tuple[float, float, float]:
        """Seconds before, after and of the bucket's computation, of the busiest rank in each."""
        machine, loads = self.machine, self.loads
        before = max(max(machine.travel(x.down_sent), machine.travel(x.down_got)) for x in loads)
        after = max(max(machine.travel(x.up_sent), machine.travel(x.up_got)) for x in loads)
        return (
            before + machine.latency * self.gathers,
            after + machine.latency * self.scatters,
            max(machine.work(x.seconds, x.operators) for x in loads),
        )

    def describe(self) -> str:
        """Describe the bucket for messages: count, transports, and name of the first matrix."""
        kinds = dict.fromkeys(str(job.transport) for job in self.jobs)
        return f"{len(self.jobs)} matrices by {'+'.join(kinds)}, first '{self.matrices[0].name}'"


@dataclass
class Load:
    """What one rank sends, receives, computes and holds in a bucket.

    Attributes:
        down_sent, down_got: before the computation.
        up_sent, up_got: after it.
        work_bytes: scratch besides what travels.
        flops: of the rank's own products.
        seconds: that its device takes for what it computes.
        batches: operators of each batch that it steps, by what makes matrices one batch.
    """

    down_sent: Bytes = Bytes()
    down_got: Bytes = Bytes()
    up_sent: Bytes = Bytes()
    up_got: Bytes = Bytes()
    work_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    batches: dict[Hashable, int] = field(default_factory=dict)

    @property
    def operators(self) -> int:
        """Operators that the rank's host issues."""
        return sum(self.batches.values())

    @property
    def sent(self) -> int:
        """Bytes that the rank sends in both directions."""
        return self.down_sent.total + self.up_sent.total

    @property
    def buffer(self) -> int:
        """Peak scratch of the rank: all that is in flight, whole operands and results."""
        return self.sent + self.down_got.total + self.up_got.total + self.work_bytes


def add(loads: Sequence[Load], job: Job, machine: Machine, alone: bool = False) -> None:
    """Add one job to the loads of a bucket. alone: it is computed by itself, not in a batch."""
    for message in job.down:
        size = machine.crossing(message.sender, message.receiver, message.size)
        loads[message.sender].down_sent += size
        loads[message.receiver].down_got += size
    for message in job.up:
        size = machine.crossing(message.sender, message.receiver, message.size)
        loads[message.sender].up_sent += size
        loads[message.receiver].up_got += size
    for rank in job.matrix.holding.of.keys() | {job.owner}:
        loads[rank].work_bytes += job.work_bytes(rank)
        cost = job.cost(rank)
        loads[rank].flops += cost.flops
        loads[rank].seconds += machine.compute(cost, job.side)
        if cost.operators:
            batch = job if alone else (job.matrix.kind, job.transport.name)
            loads[rank].batches[batch] = cost.operators


@dataclass(frozen=True)
class Plan:
    """Plan of a step: all buckets, in order."""

    buckets: tuple[Bucket, ...]
    ranks: int = 1
    sharding: Sharding = field(default_factory=Sharding)

    @cached_property
    def jobs(self) -> list[Job]:
        """Jobs of the plan: every matrix with its transport and owner."""
        return [job for bucket in self.buckets for job in bucket.jobs]

    @property
    def matrices(self) -> list[Matrix]:
        """Every matrix that the plan steps."""
        return [job.matrix for job in self.jobs]

    @property
    def orthogonalized(self) -> int:
        """Matrices whose polar factor is taken in a step."""
        return sum(m.count for m in self.matrices if m.orthogonalizes)

    @cached_property
    def bytes_sent(self) -> list[int]:
        """Bytes that each rank sends in one step."""
        return [sum(b.loads[r].sent for b in self.buckets) for r in range(self.ranks)]

    @cached_property
    def flops(self) -> list[int]:
        """FLOPs of each rank in one step."""
        loads = (b.loads for b in self.buckets)
        totals = [0] * self.ranks
        for own in loads:
            for rank, load in enumerate(own):
                totals[rank] += load.flops
        return totals

    @cached_property
    def owner_flops(self) -> list[int]:
        """FLOPs of each rank as an owner."""
        loads = [0] * self.ranks
        for job in self.jobs:
            loads[job.owner] += job.owner_cost.flops
        return loads

    @cached_property
    def owner_seconds(self) -> list[float]:
        """Seconds of each rank's device as an owner: what the plan has to balance."""
        loads = [0.0] * self.ranks
        for job in self.jobs:
            loads[job.owner] += self.sharding.machine.compute(job.owner_cost, job.side)
        return loads

    @property
    def peak_buffer(self) -> int:
        """Largest scratch on a rank: two buckets are in flight at a time."""
        peaks = [[load.buffer for load in b.loads] for b in self.buckets if b.collectives]
        if not peaks:
            return 0
        pairs = zip(peaks, [*peaks[1:], [0] * self.ranks], strict=True)
        return max(a + b for one, two in pairs for a, b in zip(one, two, strict=True))

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return seconds(bucket.phases for bucket in self.buckets)

    def lower_bound_words(self) -> float | None:
        """Least words a rank sends on average for what is orthogonalized; None if not known."""
        bounds = [lower_bound_words(m.holding) for m in self.matrices if m.orthogonalizes]
        return None if None in bounds else sum(b for b in bounds if b is not None)

    def totals(self) -> dict[str, Any]:
        """Figures of the whole step, by name."""
        owners = self.owner_seconds
        mean = sum(owners) / self.ranks
        return {
            "ranks": self.ranks,
            "matrices": len(self.jobs),
            "orthogonalized_per_step": self.orthogonalized,
            "buckets": len(self.buckets),
            "collectives_per_step": sum(b.collectives for b in self.buckets),
            "bytes_sent_per_rank": self.bytes_sent,
            "flops_per_rank": self.flops,
            "owner_balance": max(owners) / mean if mean else 1.0,
            "peak_buffer_bytes": self.peak_buffer,
            "predicted_seconds": self.seconds,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Figures of each matrix, by name: one row a matrix."""
        return [
            {
                "name": job.matrix.name,
                "shape": list(job.matrix.shape),
                "layout": job.matrix.layout.name,
                "route": job.matrix.route,
                "transport": str(job.transport),
                "owner": job.owner,
                "bucket": index,
                "bytes_sent": job.bytes_sent,
                "flops": job.total_flops,
                "scale": job.matrix.scale,
                "view": job.matrix.view.describe(),
            }
            for index, bucket in enumerate(self.buckets)
            for job in bucket.jobs
        ]

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain containers, for JSON."""
        return {"totals": self.totals(), "matrices": self.rows()}

    def digests(self) -> dict[str, str]:
        """Hash of each matrix's row, by name: where two ranks' plans differ, it says which."""
        return {row["name"]: _hash(row) for row in self.rows()}

    @cached_property
    def digest(self) -> str:
        """Hash of the plan: two ranks share it exactly when their plans agree."""
        return _hash([self.ranks, self.rows()])

    def table(self) -> str:
        """Table of the plan: one line per kind of matrix, and the totals."""
        kinds: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs:
            m = job.matrix
            key = (m.route, f"{m.shape[0]} x {m.shape[1]}", m.layout.name, str(job.transport))
            kinds.setdefault(key, []).append(job)
        wide = max([10, *(len(key[0]) for key in kinds)])
        lines = [
            f"{'route':<{wide}} {'matrix':<14} {'layout':<13} {'transport':<10} {'count':>5} "
            f"{'owners':>6} {'KiB sent/rank':>14} {'GFLOP':>10}"
        ]
        for (route, shape, layout, transport), jobs in kinds.items():
            sent = sum(job.bytes_sent for job in jobs) / self.ranks
            flops = sum(job.total_flops for job in jobs)
            owners = len({job.owner for job in jobs}) if jobs[0].transport.owned else 0
            lines.append(
                f"{route:<{wide}} {shape:<14} {layout:<13} {transport:<10} {len(jobs):>5} "
                f"{owners or '-':>6} {sent / 1024:>14,.1f} {flops / 1e9:>10,.3f}"
            )
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """Totals of the plan in words."""
        t = self.totals()
        return (
            f"per step: {t['orthogonalized_per_step']} matrices orthogonalized, "
            f"{t['collectives_per_step']} collectives in {t['buckets']} buckets over {self.ranks} "
            f"ranks, {max(self.bytes_sent) / 2**20:.2f} MiB sent by the busiest rank "
            f"({sum(self.bytes_sent) / self.ranks / 2**20:.2f} on average), "
            f"{max(self.flops) / 1e9:.3f} GFLOP on the busiest, owners balanced to "
            f"{t['owner_balance']:.2f}, buffers of {t['peak_buffer_bytes'] / 2**20:.2f} MiB "
            f"at most, {1e3 * t['predicted_seconds']:.2f} ms predicted"
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
