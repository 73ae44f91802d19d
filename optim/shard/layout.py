"""Which boxes of a matrix each rank stores, and where in its storage. No torch in here."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

Interval = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A box of a matrix: half-open row and column intervals. Empty when either is."""

    rows: Interval
    cols: Interval

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shape of the box: rows and columns."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def numel(self) -> int:
        """Number of entries of the box."""
        return self.shape[0] * self.shape[1]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the box in the whole matrix."""
        return slice(*self.rows), slice(*self.cols)


@dataclass(frozen=True)
class Piece:
    """A box of a matrix in the storage of a rank.

    Attributes:
        region: the box, in coordinates of the matrix.
        offset: place of its first entry in the rank's flattened storage.
        stride: entries of the storage from one row of the box to the next.
    """

    region: Region
    offset: int
    stride: int

    def within(self, box: Region) -> "Piece | None":
        """What the piece holds of a box, in coordinates of the box; None when nothing."""
        rows, cols = _overlap(self.region.rows, box.rows), _overlap(self.region.cols, box.cols)
        if rows[0] >= rows[1] or cols[0] >= cols[1]:
            return None
        down, right = rows[0] - self.region.rows[0], cols[0] - self.region.cols[0]
        region = Region(_shift(rows, -box.rows[0]), _shift(cols, -box.cols[0]))
        return Piece(region, self.offset + down * self.stride + right, self.stride)


def _overlap(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), min(a[1], b[1])


def _shift(interval: Interval, by: int) -> Interval:
    return interval[0] + by, interval[1] + by


def chunk(length: int, ranks: int, rank: int) -> Interval:
    """Interval of one rank under `torch.chunk`: ceil(length / ranks) each, the last ones short."""
    step = -(-length // ranks)
    return min(rank * step, length), min((rank + 1) * step, length)


class Layout(ABC):
    """How a parameter, seen as a matrix of `shape`, lies over `ranks` ranks."""

    shape: tuple[int, int]
    ranks: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the layout, a word or two for tables."""

    @abstractmethod
    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The disjoint, non-empty boxes that `rank` stores, in the order of its storage."""


@dataclass(frozen=True)
class Grid(Layout):
    """A tensor cut by the dimensions of a device mesh, as FSDP2 and tensor parallelism cut it.

    Rank r has the row-major coordinates of r in the mesh. Each cut takes the `torch.chunk` of what
    the cuts before it left: uneven and empty shards occur. Dimensions that cut nothing hold copies.

    Attributes:
        tensor: shape of the stored parameter: a scalar or vector (seen as one row), a matrix, or a
            batch of matrices (seen as one below the other); kernels, (d_out, d_in, positions).
        mesh: sizes of the mesh dimensions.
        cuts: (mesh dimension, axis of the tensor), in the order in which they were made: tensor
            parallelism first, then FSDP, whatever their order in the mesh (`_StridedShard`).
    """

    tensor: tuple[int, ...]
    mesh: tuple[int, ...] = (1,)
    cuts: tuple[tuple[int, int], ...] = ()

    @classmethod
    def whole(cls, shape: tuple[int, ...], ranks: int = 1) -> "Grid":
        """Layout where every rank has a copy (one process, DDP)."""
        return cls(shape, (ranks,))

    @classmethod
    def rows(cls, shape: tuple[int, ...], ranks: int) -> "Grid":
        """Layout that cuts axis 0: FSDP2's Shard(0)."""
        return cls(shape, (ranks,), ((0, 0),))

    @classmethod
    def cols(cls, shape: tuple[int, ...], ranks: int) -> "Grid":
        """Layout that cuts the last axis."""
        return cls(shape, (ranks,), ((0, max(0, len(shape) - 1)),))

    @cached_property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Shape of the parameter as a matrix."""
        batch, rows, cols = self._stacked
        return batch * rows, cols

    @cached_property
    def ranks(self) -> int:  # type: ignore[override]
        """Number of ranks: of all coordinates of the mesh."""
        return math.prod(self.mesh)

    @cached_property
    def _stacked(self) -> tuple[int, int, int]:
        """Shape of the parameter as a batch of matrices, (batch, rows, cols)."""
        sizes = (1,) * (3 - len(self.tensor)) + self.tensor
        return sizes[0], sizes[1], sizes[2]

    @property
    def name(self) -> str:
        """Name for tables, e.g. 'rows/4', 'rows/2 cols/2', 'whole', 'cols/2 x2' with two copies."""
        axes = ("batch", "rows", "cols")[3 - max(1, len(self.tensor)) :]
        ways = dict.fromkeys(axes, 1)  # cuts of different axes commute: one name for both orders
        for dim, axis in self.cuts:
            ways[axes[axis]] *= self.mesh[dim]
        text = " ".join(f"{axis}/{count}" for axis, count in ways.items() if count > 1) or "whole"
        copies = self.ranks // math.prod(ways.values())
        return f"{text} x{copies}" if copies > 1 else text

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Boxes that `rank` stores: one, or one a matrix if a batch is cut inside its matrices."""
        batch, rows, cols = self._intervals(rank)
        height, width = rows[1] - rows[0], cols[1] - cols[0]
        if not (batch[1] - batch[0]) * height * width:
            return ()
        full = self._stacked[1]
        if height == full:  # whole matrices lie one below the other
            return (Piece(Region((batch[0] * full, batch[1] * full), cols), 0, width),)
        return tuple(
            Piece(Region(_shift(rows, b * full), cols), (b - batch[0]) * height * width, width)
            for b in range(*batch)
        )

    def _intervals(self, rank: int) -> list[Interval]:
        place, own = [0] * len(self.mesh), rank
        for dim in reversed(range(len(self.mesh))):
            own, place[dim] = divmod(own, self.mesh[dim])
        intervals: list[Interval] = [(0, size) for size in self._stacked]
        for dim, axis in self.cuts:
            at = axis + 3 - max(1, len(self.tensor))
            start, stop = intervals[at]
            intervals[at] = _shift(chunk(stop - start, self.mesh[dim], place[dim]), start)
        return intervals


@dataclass(frozen=True)
class Flat(Layout):
    """Runs of `step` entries of the flattened matrix, row by row: DeepSpeed's ZeRO partitions.

    A run is up to three boxes: the end of a row, whole rows, the start of a row.
    """

    shape: tuple[int, int]
    ranks: int
    step: int

    @property
    def name(self) -> str:
        """Name of the layout for tables: flat, and over how many ranks."""
        return f"flat/{self.ranks}"

    def run(self, rank: int) -> Interval:
        """Interval of the flattened matrix that `rank` stores."""
        total = self.shape[0] * self.shape[1]
        return min(rank * self.step, total), min((rank + 1) * self.step, total)

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """Boxes that `rank` stores: three at most."""
        return tuple(self._boxes(*self.run(rank)))

    def _boxes(self, start: int, stop: int) -> Iterator[Piece]:
        width, at = self.shape[1], start
        while at < stop:
            row, col = divmod(at, width)
            if col or stop - at < width:  # part of one row
                end = min(stop, (row + 1) * width)
                region = Region((row, row + 1), (col, col + end - at))
            else:
                last = stop // width
                end, region = last * width, Region((row, last), (0, width))
            yield Piece(region, at - start, width)
            at = end


@dataclass(frozen=True)
class Holding:
    """Who stores what of one matrix (a box of a parameter).

    Attributes:
        box: of the parameter.
        pieces: of each rank, in coordinates of the matrix.
        words: entries that each rank stores.
        copies: ranks that store the same pieces, for each set of pieces that is stored at all.
        index: position of each rank in its copies; of a rank that stores nothing, its turn.
    """

    box: Region
    pieces: tuple[tuple[Piece, ...], ...]
    words: tuple[int, ...]
    copies: tuple[tuple[int, ...], ...]
    index: tuple[int, ...]

    @cached_property
    def of(self) -> dict[int, tuple[int, ...]]:
        """The copies that each rank belongs to; ranks that store nothing are left out."""
        return {rank: ranks for ranks in self.copies for rank in ranks}

    def shares(self, rank: int) -> int:
        """Ranks that store what `rank` stores, itself included; 1 where it stores nothing."""
        return len(self.of.get(rank, (rank,)))

    @cached_property
    def is_whole(self) -> bool:
        """Whether every rank that stores any of the matrix stores all of it."""
        return len(self.copies) == 1

    def source(self, copies: tuple[int, ...], receiver: int) -> int:
        """Which of the ranks that store the same sends it to `receiver`: spread over replicas."""
        return copies[self.index[receiver] % len(copies)]

    def spans(self, axis: int) -> bool:
        """Whether each rank's pieces are one box that is whole along `axis` (0 rows, 1 columns)."""
        whole = (0, self.box.shape[axis])
        return all(
            len(own) == 1 and (own[0].region.rows, own[0].region.cols)[axis] == whole
            for own in self.pieces
            if own
        )


@lru_cache(maxsize=4096)
def holding(layout: Layout, box: Region | None = None) -> Holding:
    """Clip a layout to a box; without one, to the whole parameter."""
    box = box or Region((0, layout.shape[0]), (0, layout.shape[1]))
    everyone = range(layout.ranks)
    found = tuple(
        tuple(kept for piece in layout.pieces(r) if (kept := piece.within(box))) for r in everyone
    )
    alike: dict[tuple[Region, ...], list[int]] = {}
    index = []
    for rank, own in enumerate(found):
        members = alike.setdefault(tuple(piece.region for piece in own), [])
        index.append(len(members))
        members.append(rank)
    words = tuple(sum(piece.region.numel for piece in own) for own in found)
    copies = tuple(tuple(ranks) for regions, ranks in alike.items() if regions)
    return Holding(box, found, words, copies, tuple(index))
