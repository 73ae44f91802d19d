"""Which region of a logical matrix each rank of a process group stores. No torch in here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

Interval = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A box of a matrix: half-open row and column intervals. Empty when either is."""

    rows: Interval
    cols: Interval

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the box."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the box in the whole matrix."""
        return slice(*self.rows), slice(*self.cols)

    def of_part(self, part: Interval) -> "Region":
        """What this box holds of the rows `part` of the matrix, in coordinates of the part."""
        start = min(max(self.rows[0], part[0]), part[1])
        stop = max(min(self.rows[1], part[1]), start)
        return Region((start - part[0], stop - part[0]), self.cols)

    def local_rows(self, part: Interval) -> Interval:
        """Where the rows `part` of the matrix lie in the tensor that stores this box."""
        inside = self.of_part(part)
        first = inside.rows[0] + part[0] - self.rows[0]
        height = inside.rows[1] - inside.rows[0]
        return (first, first + height) if height else (0, 0)


class Layout(ABC):
    """How a matrix of `shape` lies over `ranks` ranks. One class per way of cutting."""

    shape: tuple[int, int]
    ranks: int

    @abstractmethod
    def region(self, rank: int) -> Region:
        """The box that `rank` stores."""


def chunk(length: int, ranks: int, rank: int) -> Interval:
    """Interval of one rank under `torch.chunk`: ceil(length / ranks) each, the last ones short."""
    step = -(-length // ranks)
    return min(rank * step, length), min((rank + 1) * step, length)


@dataclass(frozen=True)
class Replicated(Layout):
    """Every rank stores the whole matrix (one process, DDP)."""

    shape: tuple[int, int]
    ranks: int = 1

    def region(self, rank: int) -> Region:
        """Everything."""
        return Region((0, self.shape[0]), (0, self.shape[1]))


@dataclass(frozen=True)
class RowShard(Layout):
    """Rows cut as FSDP2's Shard(0) cuts them: uneven and empty shards occur."""

    shape: tuple[int, int]
    ranks: int

    def region(self, rank: int) -> Region:
        """A run of rows."""
        return Region(chunk(self.shape[0], self.ranks, rank), (0, self.shape[1]))


@dataclass(frozen=True)
class ColShard(Layout):
    """Columns cut as Shard(1) cuts them; also a vector (1, n) under Shard(0)."""

    shape: tuple[int, int]
    ranks: int

    def region(self, rank: int) -> Region:
        """A run of columns."""
        return Region((0, self.shape[0]), chunk(self.shape[1], self.ranks, rank))
