"""What a transport is: how a matrix becomes whole enough to be stepped, and how a step runs."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from geon.optim.costs import Cost
from geon.optim.shard.layout import Piece
from geon.optim.shard.matrix import Matrix


class Message(NamedTuple):
    """What one rank sends another for one matrix.

    Attributes:
        words: (count, bytes of one) of each tensor in it, in order.
    """

    sender: int
    receiver: int
    words: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Bytes of the message."""
        return sum(count * width for count, width in self.words)


class Offer(IntEnum):
    """Whether a matrix may go by a transport."""

    NO = 0
    MAYBE = 1
    """The matrix may go this way, and the cost decides."""
    ALWAYS = 2
    """No transport could be cheaper: no other is considered."""


@dataclass(frozen=True, eq=False)
class Job:
    """A matrix with its transport and its owner. Jobs are told apart by identity.

    The owner does what no other rank does for this matrix, if its transport has such work, and
    counts it in the log.
    """

    matrix: Matrix
    transport: "Transport"
    owner: int

    @cached_property
    def down(self) -> tuple[Message, ...]:
        """Messages before the computation, by sender."""
        return tuple(self.transport.down(self.matrix, self.owner))

    @cached_property
    def up(self) -> tuple[Message, ...]:
        """Messages after the computation, by receiver."""
        return tuple(self.transport.up(self.matrix, self.owner))

    @property
    def bytes_sent(self) -> int:
        """Bytes that travel for the job in a step, over all ranks."""
        return sum(message.size for message in (*self.down, *self.up))

    def cost(self, rank: int) -> Cost:
        """Cost of the job in a step, on one rank."""
        share = self.matrix.share(rank)
        shared = self.shared_cost.batch(share) if share else Cost()
        return self.owner_cost + shared if rank == self.owner else shared

    @cached_property
    def owner_cost(self) -> Cost:
        """Cost that falls to the owner alone: what a plan has to balance."""
        return self.transport.owner_cost(self.matrix)

    @cached_property
    def shared_cost(self) -> Cost:
        """Cost of each copy of the matrix, over the ranks that store it."""
        return self.transport.shared_cost(self.matrix)

    @property
    def total_flops(self) -> int:
        """FLOPs of the job in a step, on all ranks together."""
        return self.owner_cost.flops + round(self.shared_cost.flops * self.matrix.copies)

    @property
    def side(self) -> int:
        """Short side of its matrices, which the speed of their products depends on."""
        return min(self.matrix.forms[0].shape)

    def work_bytes(self, rank: int) -> int:
        """Scratch bytes of the job on a rank besides what travels, in fp32."""
        return self.transport.work_bytes(self.matrix, self.owner, rank)


Letters = dict[tuple[Job, int], Sequence[Tensor]]
"""Tensors by job and the other rank: the receiver of what is sent, the sender of what came."""


class Work(Protocol):
    """One step of this rank's tensors; what travels is fp32 here, flat, in the order of words."""

    rank: int
    alone: bool
    """Whether matrices are computed one by one."""

    def moves(self, matrix: Matrix) -> bool:
        """Whether the matrix is stepped: it has a gradient."""

    def operand(self, matrix: Matrix, index: int, piece: Piece) -> Tensor:
        """A piece (rows, cols) that this rank stores: 0 of the update, 1 of the weight, fp32."""

    def row_states(self, matrix: Matrix) -> Sequence[Tensor]:
        """Row states of the matrix that the rule keeps, a number for each row of each form."""

    def solve(self, jobs: Sequence[Job], operands: Sequence[Tensor]) -> Tensor:
        """Results (batch, rows, cols) for alike matrices, or pieces; row states are written."""

    def write(self, results: Iterable[tuple[Matrix, Piece, Tensor]]) -> None:
        """Take pieces of results into the weights of their matrices."""

    def set_row_states(self, matrix: Matrix, states: Sequence[Tensor]) -> None:
        """Take the row states that came with a result of the matrix."""

    def lr(self, matrix: Matrix) -> float:
        """Learning rate of the matrix in this step."""

    def gram_form(self, matrix: Matrix) -> Any:
        """The step of the matrix from sums over its long side (optim/solvers/sums.py)."""

    def row_form(self, matrix: Matrix) -> Any:
        """The step of the matrix's rows from their lengths (optim/solvers/sums.py)."""

    def count_fallbacks(self, fell_back: Tensor) -> None:
        """Count matrices that a cheaper solver stood in for."""


class Transport(ABC):
    """How a matrix becomes whole enough to be stepped. One object each, without state.

    Planning is pure: what is sent, computed and held follows from the matrix and its owner. A step
    has three phases on every rank, and what a phase sends to the rank itself comes back in the
    next one without travelling.

    Attributes:
        name: in configs, plans and tables.
        owned: whether the owner does something that others do not.
    """

    name: ClassVar[str]
    owned: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.name

    # Planning.

    @abstractmethod
    def offer(self, matrix: Matrix, reproducible: bool) -> Offer:
        """Whether a matrix may go this way. reproducible: no sums over ranks."""

    def down(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages that are sent for a matrix before its computation."""
        return ()

    def up(self, matrix: Matrix, owner: int) -> Iterable[Message]:
        """Messages that are sent for a matrix after its computation."""
        return ()

    def owner_cost(self, matrix: Matrix) -> Cost:
        """Cost of a matrix that falls to its owner alone."""
        return Cost()

    def shared_cost(self, matrix: Matrix) -> Cost:
        """Cost of each copy of the matrix, on each rank in proportion to what it stores."""
        return Cost()

    def work_bytes(self, matrix: Matrix, owner: int, rank: int) -> int:
        """Scratch bytes of a matrix on a rank besides what travels."""
        return 0

    # A step, each phase for all jobs of a bucket that go this way.

    def depart(self, jobs: Sequence[Job], work: Work) -> Letters:
        """Return what this rank sends to the owners."""
        return {}

    @abstractmethod
    def compute(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> Letters:
        """Compute what falls to this rank; return what it sends on."""

    def land(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> None:
        """Take what came into the weights."""
        return


def to_owner(
    matrix: Matrix, owner: int, words: Callable[[int], tuple[tuple[int, int], ...]]
) -> Iterable[Message]:
    """A message of one rank of each set of copies that the owner does not belong to.

    words: of a sender; nothing is sent where there are none.
    """
    for ranks in matrix.holding.copies:
        if owner not in ranks:
            sender = matrix.holding.source(ranks, owner)
            if any(count for count, _ in words(sender)):
                yield Message(sender, owner, words(sender))


def sends(job: Job, rank: int) -> bool:
    """Whether a rank sends for a job before the computation, or would if it were not the owner."""
    return (rank == job.owner and rank in job.matrix.holding.of) or any(
        message.sender == rank for message in job.down
    )


def senders(job: Job, inbox: Letters) -> tuple[int, ...]:
    """Ranks whose part of a job is in its owner's inbox, in ascending order."""
    ranks = {job.owner, *(message.sender for message in job.down)}
    return tuple(rank for rank in sorted(ranks) if (job, rank) in inbox)


def batches(
    jobs: Iterable[Job], alone: bool, also: Callable[[Job], Hashable] = lambda _: None
) -> list[list[Job]]:
    """Jobs of one kind together; with `alone`, each by itself."""
    found: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        found[job.matrix.kind, also(job), job if alone else None].append(job)
    return list(found.values())
