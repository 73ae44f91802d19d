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

    def of_box(self, box: "Region") -> "Region":
        """What this box holds of another, in coordinates of the other."""
        return Region(_overlap(self.rows, box.rows), _overlap(self.cols, box.cols))

    def local(self, box: "Region") -> "Region":
        """Where what this box holds of another lies in the tensor that stores this box."""
        held = self.of_box(box)
        return Region(
            _shift(held.rows, box.rows[0] - self.rows[0]),
            _shift(held.cols, box.cols[0] - self.cols[0]),
        )


def _overlap(own: Interval, other: Interval) -> Interval:
    """Intersection of two intervals, counted from the start of the other."""
    start = min(max(own[0], other[0]), other[1])
    stop = max(min(own[1], other[1]), start)
    return start - other[0], stop - other[0]


def _shift(interval: Interval, by: int) -> Interval:
    """The interval moved; an empty one at the origin, since it lies nowhere."""
    empty = interval[0] == interval[1]
    return (0, 0) if empty else (interval[0] + by, interval[1] + by)


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
