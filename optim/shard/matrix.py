"""A matrix to step, and a way to step it: what each rank sends, computes and holds. No torch."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from geon.optim.norms import Reach
from geon.optim.shard.layout import Holding, Layout, Region, holding

FP32 = 4
"""Bytes of a weight, a sum or a coefficient on the wire; updates and directions may be 2."""


class Transport(StrEnum):
    """How a matrix becomes whole enough to be stepped."""

    LOCAL = "local"
    """Every rank already holds what it needs. Nothing is sent."""
    OWNER = "owner"
    """One rank receives the whole matrix, computes, and sends each rank its part of the result."""
    GRAM = "gram"
    """Sums over the long side go to one rank, coefficients of the short side come back."""
    NORMS = "norms"
    """The same for row norms: squares of rows that several ranks share, and norms back."""
    ALLGATHER = "allgather"
    """Every rank receives the whole matrix and computes the same step."""


SUMMED = (Transport.GRAM, Transport.NORMS)
"""Transports of sums and coefficients, not of matrices."""


class Sums(NamedTuple):
    """What a step takes that needs sums over ranks, and not the whole matrix.

    Attributes:
        transport: GRAM, or NORMS.
        down: words a rank sends to the owner; NORMS: a row.
        up: words a rank receives from the owner; NORMS: a row.
        owner_flops: on the owner.
        shared_flops: over all ranks, each in proportion to what it holds.
    """

    transport: Transport
    down: int
    up: int
    owner_flops: int
    shared_flops: int


@dataclass(frozen=True)
class Matrix:
    """One matrix to step: a parameter, one of the parts fused in it, or a head's block.

    Attributes:
        param: name of the parameter.
        box: rows and columns of the parameter that are this matrix.
        layout: of the parameter.
        rule: name of its rule.
        reach: how much must be whole on a rank.
        operands: tensors a step needs whole: 1 (the update), or 2 (the weight too).
        wire_bytes: bytes of one entry of an update or direction on the wire; weights take 4.
        flops: FLOPs of the step on the whole matrix.
        half: whether those are in bf16; sums never are.
        orthogonalizes: whether the step takes a polar factor.
        scale: size of this matrix over the one that its rule gives to a matrix of its shape; not 1
            for a head's block only.
        sums: the form that needs sums alone, if the rule has one.
        row_state: whether the owner's result carries one number a row for every rank.
    """

    param: str
    box: Region
    layout: Layout
    rule: str
    reach: Reach
    operands: int
    wire_bytes: int
    flops: int
    orthogonalizes: bool
    half: bool = False
    scale: float = 1.0
    sums: Sums | None = None
    row_state: bool = False

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

    @cached_property
    def holding(self) -> Holding:
        """Who stores what of it."""
        return holding(self.layout, self.box)

    @property
    def bytes_in(self) -> int:
        """Bytes an entry takes on the way to who computes."""
        return self.wire_bytes + (FP32 if self.operands == 2 else 0)

    @property
    def bytes_out(self) -> int:
        """Bytes an entry of the result takes: a direction, or the new weight on a manifold."""
        return FP32 if self.operands == 2 else self.wire_bytes

    @property
    def fits(self) -> bool:
        """Whether every rank that stores any of it stores all that its rule must see at once."""
        if self.row_state and len(self.holding.of) < self.layout.ranks:
            return False
        if self.reach is Reach.MATRIX:
            return self.holding.is_whole
        width = (0, self.shape[1])
        return self.reach is Reach.ENTRY or all(
            piece.region.cols == width for own in self.holding.pieces for piece in own
        )

    @property
    def can_sum(self) -> bool:
        """Whether `sums` applies: for GRAM, each rank must hold the whole short side."""
        if self.sums is None or self.row_state:
            return False
        if self.sums.transport is Transport.NORMS:
            return True
        short = 1 if self.shape[0] >= self.shape[1] else 0
        return self.holding.spans(short)

    def shared_rows(self, rank: int) -> list[tuple[int, int]]:
        """Intervals of rows that `rank` stores a part of only."""
        width = (0, self.shape[1])
        return [p.region.rows for p in self.holding.pieces[rank] if p.region.cols != width]

    def sum_words(self, rank: int) -> tuple[int, int]:
        """Words that `rank` contributes to the sums, and words of what it gets back."""
        assert self.sums is not None
        rows = 1
        if self.sums.transport is Transport.NORMS:
            rows = sum(stop - start for start, stop in self.shared_rows(rank))
        return rows * self.sums.down, rows * self.sums.up


@dataclass(frozen=True)
class Traffic:
    """Bytes by rank, of one matrix or summed over several; ranks with none are left out."""

    gather_sent: Mapping[int, int]
    gather_received: Mapping[int, int]
    scatter_sent: Mapping[int, int]
    scatter_received: Mapping[int, int]

    @property
    def total(self) -> int:
        """Bytes that all ranks send together."""
        return sum(self.gather_sent.values()) + sum(self.scatter_sent.values())


@dataclass(frozen=True)
class Job:
    """A matrix with its transport and its owner.

    The owner computes (OWNER) or sums (GRAM, NORMS); where every rank computes the same, it is the
    one that counts it in the log.
    """

    matrix: Matrix
    transport: Transport
    owner: int

    def gathers(self, receiver: int) -> list[tuple[int, ...]]:
        """Copies that `receiver` needs the pieces or sums of, from others."""
        wants = receiver == self.owner
        if self.transport is Transport.ALLGATHER:
            wants = receiver in self.matrix.holding.of or self.matrix.row_state
        if self.transport is Transport.LOCAL or not wants:
            return []
        return [ranks for ranks in self.matrix.holding.copies if receiver not in ranks]

    @property
    def scatters(self) -> bool:
        """Whether results travel."""
        return self.transport in (Transport.OWNER, *SUMMED)

    @property
    def summed(self) -> bool:
        """Whether sums travel instead of entries."""
        return self.transport in SUMMED

    def words_down(self, rank: int) -> int:
        """Words that `rank` sends to one receiver: entries of one operand, or sums."""
        if self.summed:
            return self.matrix.sum_words(rank)[0]
        return self.matrix.holding.words[rank]

    def bytes_down(self, rank: int) -> int:
        """Bytes of that, over all operands."""
        return self.words_down(rank) * (FP32 if self.summed else self.matrix.bytes_in)

    def bytes_up(self, rank: int) -> int:
        """Bytes that the owner sends to another rank."""
        if self.summed:
            return self.matrix.sum_words(rank)[1] * FP32 if rank in self.matrix.holding.of else 0
        rows = self.matrix.shape[0] * FP32 if self.matrix.row_state else 0
        return self.matrix.holding.words[rank] * self.matrix.bytes_out + rows

    @cached_property
    def traffic(self) -> Traffic:
        """What a step sends."""
        out, received, up, result = (defaultdict[int, int](int) for _ in range(4))
        everyone = range(self.matrix.layout.ranks)
        for receiver in everyone if self.transport is Transport.ALLGATHER else (self.owner,):
            for ranks in self.gathers(receiver):
                source = self.matrix.holding.source(ranks, receiver)
                size = self.bytes_down(source)
                out[source] += size
                received[receiver] += size
        if self.scatters:
            sizes = ((r, self.bytes_up(r)) for r in everyone if r != self.owner)
            result.update({rank: size for rank, size in sizes if size})
            up[self.owner] = sum(result.values())
        return Traffic(out, received, up, result)

    @property
    def total_flops(self) -> int:
        """FLOPs of a step on all ranks together."""
        matrix, held = self.matrix, self.matrix.holding
        share = sum(held.words) / (matrix.shape[0] * matrix.shape[1])
        if self.transport is Transport.OWNER:
            return matrix.flops
        if self.transport is Transport.ALLGATHER:
            return matrix.flops * (matrix.layout.ranks if matrix.row_state else len(held.of))
        if self.transport is Transport.LOCAL:
            return round(matrix.flops * share)
        assert matrix.sums is not None
        return matrix.sums.owner_flops + round(matrix.sums.shared_flops * share)

    def flops(self, rank: int) -> int:
        """FLOPs of a step on a rank."""
        matrix, words = self.matrix, self.matrix.holding.words[rank]
        share = words / (matrix.shape[0] * matrix.shape[1])
        if self.transport is Transport.OWNER:
            return matrix.flops if rank == self.owner else 0
        if self.transport is Transport.ALLGATHER:
            return matrix.flops if words or matrix.row_state else 0
        if self.transport is Transport.LOCAL:
            return round(matrix.flops * share)
        assert matrix.sums is not None
        own = matrix.sums.owner_flops if rank == self.owner else 0
        return own + round(matrix.sums.shared_flops * share)

    @property
    def owner_flops(self) -> int:
        """FLOPs that fall to the owner alone: what a plan has to balance."""
        if self.transport is Transport.OWNER:
            return self.matrix.flops
        return self.matrix.sums.owner_flops if self.matrix.sums and self.scatters else 0

    @property
    def half(self) -> bool:
        """Whether `flops` are in bf16."""
        return self.matrix.half and not self.summed

    def words_sent(self) -> int:
        """Words that all ranks send together: bytes, if each word were of fp32."""
        wide = replace(self.matrix, wire_bytes=FP32)
        return Job(wide, self.transport, self.owner).traffic.total // FP32

    def work_bytes(self, rank: int) -> int:
        """Scratch on a rank besides what travels: whole operands and the result, in fp32."""
        matrix = self.matrix
        if self.summed:
            down, up = matrix.sum_words(rank)
            own = (down + up) * FP32 if rank == self.owner else 0
            return own + matrix.holding.words[rank] * FP32
        computes = rank == self.owner or (
            self.transport is Transport.ALLGATHER and bool(matrix.holding.words[rank])
        )
        if self.transport is Transport.LOCAL or not computes:
            return 0
        return matrix.shape[0] * matrix.shape[1] * FP32 * (matrix.operands + 1)
