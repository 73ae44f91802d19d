"""Which transport each matrix takes and what it costs: pure Python, no process group.

The plan is made before anything is sent, is printed by `mode=plan`, and the exchange follows it
to the byte.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from geon.optim.norms import Reach
from geon.optim.shard.layout import Layout, Region


class Transport(StrEnum):
    """How a matrix becomes whole enough to be stepped."""

    LOCAL = "local"
    """Every rank already holds what it needs. Nothing is sent."""
    ALLGATHER = "allgather"
    """Every rank gathers the whole matrix and computes the same step: (P-1)/P N e bytes."""


@dataclass(frozen=True)
class Matrix:
    """One matrix to step: a parameter, one of the parts fused in it, or a head's block.

    Attributes:
        param: name of the parameter.
        box: rows and columns of the parameter that are this matrix.
        layout: of the parameter, over the ranks of `group`.
        group: key of the process group that the parameter is sharded over.
        rule: name of its rule.
        reach: how much must be whole on a rank.
        operands: tensors a step needs whole: 1 (the update), or 2 (the weight too).
        element_bytes: bytes of one entry on the wire.
        flops: FLOPs of the step on the whole matrix.
        orthogonalizes: whether the step takes a polar factor.
        scale: size of this matrix over the one that its rule gives to a matrix of its shape; not 1
            for a head's block only.
    """

    param: str
    box: Region
    layout: Layout
    group: str
    rule: str
    reach: Reach
    operands: int
    element_bytes: int
    flops: int
    orthogonalizes: bool
    scale: float = 1.0

    @property
    def name(self) -> str:
        """Parameter name, with the rows and columns when it is only a part of it."""
        rows, cols = (f"{start}:{stop}" for start, stop in (self.box.rows, self.box.cols))
        if self.box.shape == self.layout.shape:
            return self.param
        if self.shape[1] == self.layout.shape[1]:
            return f"{self.param}[{rows}]"
        tall = self.shape[0] == self.layout.shape[0]
        return f"{self.param}[{':' if tall else rows}, {cols}]"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the whole matrix."""
        return self.box.shape

    def region(self, rank: int) -> Region:
        """What `rank` stores of this matrix, in its own coordinates."""
        return self._regions[rank]

    def local(self, rank: int) -> Region:
        """Where that lies in the tensor that `rank` stores of the parameter."""
        return self._locals[rank]

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        return tuple(self.layout.region(r).of_box(self.box) for r in range(self.layout.ranks))

    @cached_property
    def _locals(self) -> tuple[Region, ...]:
        return tuple(self.layout.region(r).local(self.box) for r in range(self.layout.ranks))


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together: one collective, or none when local."""

    transport: Transport
    group: str
    ranks: int
    matrices: tuple[Matrix, ...]

    def elements(self, rank: int) -> int:
        """Entries that `rank` contributes, over all operands."""
        return sum(m.region(rank).numel * m.operands for m in self.matrices)

    def bytes_of(self, matrix: Matrix, rank: int) -> int:
        """Bytes that `rank` sends to others for one of the matrices, in one step."""
        if self.transport is Transport.LOCAL:
            return 0
        piece = matrix.region(rank).numel * matrix.operands * matrix.element_bytes
        return piece * (self.ranks - 1)

    def bytes_sent(self, rank: int) -> int:
        """Bytes that `rank` sends to others for one step."""
        return sum(self.bytes_of(m, rank) for m in self.matrices)

    @property
    def collectives(self) -> int:
        """Collectives issued for one step."""
        return 0 if self.transport is Transport.LOCAL else 1

    def buffer_bytes(self) -> int:
        """Peak scratch on a rank: send buffer, receive buffer and the whole operands."""
        if self.transport is Transport.LOCAL:
            return 0
        whole = sum(m.shape[0] * m.shape[1] * m.operands * m.element_bytes for m in self.matrices)
        return 2 * whole + max(self.bytes_sent(r) for r in range(self.ranks)) // (self.ranks - 1)


@dataclass(frozen=True)
class Plan:
    """All buckets of a step, in order."""

    buckets: tuple[Bucket, ...]

    @property
    def matrices(self) -> list[tuple[Matrix, Bucket]]:
        """Every matrix with its bucket."""
        return [(m, b) for b in self.buckets for m in b.matrices]

    @property
    def orthogonalized(self) -> int:
        """Matrices whose polar factor is taken in a step."""
        return sum(m.orthogonalizes for m, _ in self.matrices)

    def bytes_sent(self, rank: int) -> int:
        """Bytes that the rank of this index in each group sends for one step."""
        return sum(b.bytes_sent(rank) for b in self.buckets if rank < b.ranks)

    def totals(self) -> dict[str, Any]:
        """Figures of the whole step."""
        ranks = max((b.ranks for b in self.buckets), default=1)
        return {
            "ranks": ranks,
            "matrices": len(self.matrices),
            "orthogonalized_per_step": self.orthogonalized,
            "collectives_per_step": sum(b.collectives for b in self.buckets),
            "bytes_sent_per_rank": [self.bytes_sent(r) for r in range(ranks)],
            "flops_per_rank": sum(m.flops for m, _ in self.matrices),
            "peak_buffer_bytes": max((b.buffer_bytes() for b in self.buckets), default=0),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        rows = []
        for index, bucket in enumerate(self.buckets):
            for m in bucket.matrices:
                rows.append(
                    {
                        "name": m.name,
                        "shape": list(m.shape),
                        "layout": type(m.layout).__name__,
                        "rule": m.rule,
                        "transport": str(bucket.transport),
                        "bucket": index,
                        "bytes_sent": [bucket.bytes_of(m, r) for r in range(bucket.ranks)],
                        "flops": m.flops,
                        "scale": m.scale,
                    }
                )
        return {"totals": self.totals(), "matrices": rows}

    def digest(self) -> str:
        """Hash that two ranks share exactly when their plans agree."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def table(self) -> str:
        """One line per kind of matrix, and the totals."""
        kinds: dict[tuple[str, ...], list[tuple[Matrix, Bucket]]] = {}
        for m, bucket in self.matrices:
            key = (m.rule, f"{m.shape[0]} x {m.shape[1]}", type(m.layout).__name__)
            kinds.setdefault((*key, str(bucket.transport)), []).append((m, bucket))
        lines = [
            f"{'route':<10} {'matrix':<14} {'layout':<11} {'transport':<10} {'count':>5} "
            f"{'KiB sent/rank':>14} {'MFLOP':>10}"
        ]
        for (rule, shape, layout, transport), members in kinds.items():
            sent = sum(b.bytes_of(m, rank=0) for m, b in members)
            flops = sum(m.flops for m, _ in members)
            lines.append(
                f"{rule:<10} {shape:<14} {layout:<11} {transport:<10} {len(members):>5} "
                f"{sent / 1024:>14,.1f} {flops / 1e6:>10,.1f}"
            )
        t = self.totals()
        lines.append(
            f"per step: {t['orthogonalized_per_step']} matrices orthogonalized, "
            f"{t['collectives_per_step']} collectives over {t['ranks']} ranks, "
            f"{max(t['bytes_sent_per_rank']) / 2**20:.2f} MiB sent by the busiest rank, "
            f"{t['flops_per_rank'] / 1e9:.3f} GFLOP per rank, "
            f"buffer at most {t['peak_buffer_bytes'] / 2**20:.2f} MiB"
        )
        return "\n".join(lines)


def choose(matrix: Matrix) -> Transport:
    """LOCAL when every rank's region already spans what the rule needs, else ALLGATHER."""
    m, n = matrix.shape
    for rank in range(matrix.layout.ranks):
        region = matrix.region(rank)
        if region.numel == 0 and matrix.reach is not Reach.MATRIX:
            continue
        if matrix.reach >= Reach.ROW and region.cols != (0, n):
            return Transport.ALLGATHER
        if matrix.reach is Reach.MATRIX and region.rows != (0, m):
            return Transport.ALLGATHER
    return Transport.LOCAL


def make_plan(matrices: Sequence[Matrix], max_buffer_mb: float = 64.0) -> Plan:
    """Choose transports and fill buckets.

    Buckets keep the order of the matrices, hold one transport and group each, and stay under
    `max_buffer_mb` of scratch, except that one matrix larger than the limit has a bucket alone.
    """
    limit = max_buffer_mb * 2**20
    filling: list[_Filling] = []
    for matrix in matrices:
        alone = _Filling(choose(matrix), matrix)
        taker = next((f for f in filling if f.has_room_for(alone, limit)), None)
        if taker is None:
            filling.append(alone)
        else:
            taker.join(alone)
    return Plan(tuple(f.bucket() for f in filling))


class _Filling:
    """A bucket while it is filled, with running sums: per-head blocks come in thousands."""

    def __init__(self, transport: Transport, matrix: Matrix) -> None:
        self.key = (transport, matrix.group)
        self.matrices = [matrix]
        entry = 0 if transport is Transport.LOCAL else matrix.operands * matrix.element_bytes
        self.whole = matrix.shape[0] * matrix.shape[1] * entry
        self.own = [matrix.region(r).numel * entry for r in range(matrix.layout.ranks)]

    def has_room_for(self, other: "_Filling", limit: float) -> bool:
        """Whether the other may join: `Bucket.buffer_bytes` of both together."""
        if self.key != other.key:
            return False
        most = max(a + b for a, b in zip(self.own, other.own, strict=True))
        return 2 * (self.whole + other.whole) + most <= limit

    def join(self, other: "_Filling") -> None:
        """Take the other's matrices."""
        self.matrices += other.matrices
        self.whole += other.whole
        self.own = [a + b for a, b in zip(self.own, other.own, strict=True)]

    def bucket(self) -> Bucket:
        """What was filled."""
        ranks = self.matrices[0].layout.ranks
        return Bucket(*self.key, ranks, tuple(self.matrices))
