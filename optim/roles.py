"""What a parameter is to its model, and how its matrices are stored: this decides how it steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from geon.optim.views import Form, View


class Role(StrEnum):
    """What a parameter does. Declared by the model, read by the router."""

    EMBEDDING = "embedding"
    """Rows are vectors looked up by token or position: stored (vocab, d)."""
    HEAD = "head"
    """Maps the last activation to logits: stored (vocab, d)."""
    TIED = "tied"
    """One weight that is both embedding and head."""
    HIDDEN = "hidden"
    """A matrix (d_out, d_in) between activations; `ParamInfo` says how it is stored."""
    GAIN = "gain"
    BIAS = "bias"
    SCALAR = "scalar"
    OTHER = "other"
    """What is no matrix, or not surely one, of any shape: stepped entry by entry."""


Interval = tuple[int, int]
MATRIX_ROLES = frozenset({Role.EMBEDDING, Role.HEAD, Role.TIED, Role.HIDDEN})


@dataclass(frozen=True)
class Block:
    """What is stepped inside a parameter: half-open intervals of its stored rows and columns.

    Attributes:
        rows: of the parameter as a matrix (`ParamInfo.matrix_shape`).
        cols: of the parameter as a matrix.
        states: interval of the parameter's row states: one number for each row (d_out) of each
            matrix in the block.
        whole: shape (d_out, d_in) of the matrix that a head's block is cut from; otherwise None.
        view: how matrices lie in the box; plain for one that is the box.
    """

    rows: Interval
    cols: Interval
    states: Interval
    whole: tuple[int, int] | None = None
    view: View = View()

    @property
    def box(self) -> tuple[int, int]:
        """Shape of the box as it is stored."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def forms(self) -> tuple[Form, ...]:
        """How many matrices of which shape (d_out, d_in) lie in the box."""
        return self.view.forms(self.box)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the block in the parameter as a matrix."""
        return slice(*self.rows), slice(*self.cols)


@dataclass(frozen=True)
class ParamInfo:
    """One parameter as its model declares it.

    By default a hidden weight is a matrix (d_out, d_in), or a batch of them (batch, d_out, d_in),
    e.g. one for each expert, which are stepped one by one. The other attributes say how it is
    stored otherwise. Every rule steps fused matrices separately.

    Attributes:
        name: fully qualified name, as in `named_parameters()`.
        shape: shape of the whole (unsharded) parameter, as it is stored.
        role: what the parameter does.
        splits: sizes of the matrices that are fused along `split_axis`, e.g. (d, d, d) for q, k, v,
            in order; empty for a parameter that is one matrix.
        heads: attention heads that share each part equally, in order; 0 when it has none. One
            number for all parts, or one for each: (32, 8, 8) for grouped queries.
        head_axis: 0 when a head owns rows of (d_out, d_in) (q, k, v), 1 when it owns columns (the
            output projection).
        transposed: matrices are stored (d_in, d_out), as in transformers' Conv1D.
        split_axis: 0 when fused matrices share their input, 1 when they share their output.
        interleaved: stretches of d_out that each hold their share of every fused matrix: the
            number of heads for rows (heads, 3, head_dim); 0 when each matrix is in one piece.
        kernel: dimensions of a convolution's kernel, the last ones of the shape (d_out, d_in, ...).
        by_position: step each position of the kernel as a matrix of its own, by 1/positions, as
            Scion does; otherwise the kernel is one matrix (d_out, d_in positions).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    splits: tuple[int, ...] = ()
    heads: int | tuple[int, ...] = 0
    head_axis: int = 0
    transposed: bool = False
    split_axis: int = 0
    interleaved: int = 0
    kernel: int = 0
    by_position: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        self._check_shape()
        self._check_splits()
        if self.heads:
            self._check_heads()

    def _check_types(self) -> None:
        heads = (self.heads,) if isinstance(self.heads, int) else self.heads
        for key, sizes in (("splits", self.splits), ("heads", heads)):
            if not isinstance(sizes, tuple) or not all(type(size) is int for size in sizes):
                raise ValueError(
                    f"{self.name}: {key} {getattr(self, key)!r} must be whole numbers, as (64, 64)"
                )

    def _check_shape(self) -> None:
        hidden, plain = self.role is Role.HIDDEN, len(self.shape) - self.kernel == 2
        if not 0 <= self.kernel <= 3 or (self.kernel and not (plain and hidden)):
            raise ValueError(
                f"{self.name}: kernel {self.kernel} of a weight of shape {self.shape} and role "
                f"'{self.role}': a convolution is hidden, (d_out, d_in) and 1 to 3 dimensions"
            )
        if self.role in MATRIX_ROLES and not plain and not (hidden and len(self.shape) == 3):
            told = "; a convolution says kernel=2, or is of role other" if hidden else ""
            raise ValueError(
                f"{self.name}: role '{self.role}' needs a matrix (d_out, d_in), got "
                f"{self.shape}{told}"
            )
        if self.by_position and not self.kernel:
            raise ValueError(f"{self.name}: by_position without a kernel has no effect")
        if self.kernel and (self.transposed or self.interleaved or self.heads or self.split_axis):
            raise ValueError(
                f"{self.name}: a convolution is stored (d_out, d_in, positions), and may only have "
                "splits of d_out: transposed, interleaved, heads and split_axis are for matrices"
            )

    def _check_splits(self) -> None:
        if self.split_axis not in (0, 1):
            raise ValueError(f"{self.name}: split_axis {self.split_axis} is not 0 or 1")
        if self.head_axis not in (0, 1) and not self.heads:
            raise ValueError(f"{self.name}: head_axis {self.head_axis} is not 0 or 1")
        if type(self.interleaved) is not int or self.interleaved < 0:
            raise ValueError(
                f"{self.name}: interleaved {self.interleaved} is not a number of stretches"
            )
        if not self.splits:
            if self.interleaved or self.split_axis:
                raise ValueError(f"{self.name}: interleaved and split_axis need splits")
            return
        size = self.matrix[self.split_axis]
        if sum(self.splits) != size or min(self.splits) < 1:
            what = ("d_out", "d_in")[self.split_axis]
            where = f" of a batch of matrices {self.shape}" if self._batch > 1 else ""
            raise ValueError(
                f"{self.name}: splits {self.splits}{where} sum to {sum(self.splits)}, but {what} "
                f"is {size}"
            )
        if self.interleaved and (
            self.split_axis or any(rows % self.interleaved for rows in self.splits)
        ):
            raise ValueError(
                f"{self.name}: splits {self.splits} along axis {self.split_axis} do not lie in "
                f"{self.interleaved} equal stretches of d_out"
            )

    def _check_heads(self) -> None:
        if self.head_axis not in (0, 1) or min(self._part_heads) < 0 or len(self.shape) != 2:
            raise ValueError(
                f"{self.name}: {self.heads} heads on axis {self.head_axis} of a weight of shape "
                f"{self.shape}: heads share the rows (axis 0) or columns (axis 1) of a matrix"
            )
        if len(self._part_heads) != max(1, len(self.splits)):
            raise ValueError(
                f"{self.name}: heads {self.heads} of {max(1, len(self.splits))} matrices: give one "
                "number, or one for each of splits"
            )
        for (rows, cols), heads in zip(self._parts, self._part_heads, strict=True):
            size = (rows[1] - rows[0], cols[1] - cols[0])[self.head_axis]
            if heads and (size % heads or (self.interleaved and heads % self.interleaved)):
                what = ("rows", "columns")[self.head_axis]
                where = f" in {self.interleaved} stretches" if self.interleaved else ""
                raise ValueError(
                    f"{self.name}: {size} {what}{where} do not divide into {heads} heads"
                )

    @property
    def numel(self) -> int:
        """Number of entries of the whole parameter."""
        return prod(self.shape)

    @property
    def storage(self) -> str:
        """How the weight is stored, in words for tables; nothing for one matrix (d_out, d_in)."""
        words = [f"{len(self.splits)} fused"] if self.splits else []
        words += ["by columns"] if self.split_axis else []
        words += ["interleaved"] if self.interleaved else []
        words += ["transposed"] if self.transposed else []
        if self.kernel:
            words += ["kernel by position" if self.by_position else "kernel"]
        return ", ".join(words)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape as one stored matrix: vectors are one row, batches and channels lie below."""
        if len(self.shape) < 3:
            return (1, self.numel) if len(self.shape) < 2 else (self.shape[0], self.shape[1])
        return self.shape[0] * self.shape[1], prod(self.shape[2:])

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of one matrix of the batch, fused ones together."""
        if self.kernel:
            return self.shape[0], prod(self.shape[1:])
        rows, cols = (1, *self.shape)[-2:] if self.shape else (1, 1)
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def _batch(self) -> int:
        """Number of matrices that are stored one below the other."""
        return self.shape[0] if len(self.shape) == 3 and not self.kernel else 1

    @property
    def parts(self) -> tuple[Interval, ...]:
        """Row interval (start, stop) of each fused or batched matrix; one when there is one."""
        tall, (rows, _) = self.split_axis == 0, self.matrix
        bounds = [0]
        for size in (self.splits if tall and self.splits else (rows,)) * self._batch:
            bounds.append(bounds[-1] + size)
        return tuple(zip(bounds[:-1], bounds[1:], strict=True))

    @property
    def _parts(self) -> list[tuple[Interval, Interval]]:
        """Rows and columns of each fused matrix in (d_out, d_in), as if it were in one piece."""
        rows, cols = self.matrix
        found, at = [], 0
        for size in self.splits or (self.matrix[self.split_axis],):
            own = at, at + size
            found.append((own, (0, cols)) if self.split_axis == 0 else ((0, rows), own))
            at += size
        return found

    @property
    def _part_heads(self) -> tuple[int, ...]:
        """Attention heads of each fused matrix."""
        if isinstance(self.heads, int):
            return (self.heads,) * max(1, len(self.splits))
        return self.heads

    def blocks(self, per_head: bool = False) -> tuple[Block, ...]:
        """What is stepped: the fused parts, or with `per_head` each head's share of them.

        A parameter without heads gives its parts either way.
        """
        stored = self.matrix_shape
        if self.kernel:
            return self._kernels()
        heads = self._part_heads if per_head else (0,) * max(1, len(self.splits))
        found: list[Block] = []
        for top in range(0, stored[0], max(1, stored[0] // max(1, self._batch))):
            if self.interleaved and not any(heads):
                shares = tuple(rows // self.interleaved for rows in self.splits)
                view = View(self.transposed, shares)
                start = found[-1].states[1] if found else 0
                found.append(
                    self._block(top, (0, self.matrix[0]), (0, self.matrix[1]), start, view)
                )
                continue
            view = View(self.transposed)
            for rows, cols, whole in self._pieces(heads):
                start = found[-1].states[1] if found else 0
                found.append(self._block(top, rows, cols, start, view, whole))
        return tuple(found)

    def _block(
        self,
        top: int,
        rows: Interval,
        cols: Interval,
        start: int,
        view: View,
        whole: tuple[int, int] | None = None,
    ) -> Block:
        """A block of rows and columns of (d_out, d_in), of the matrix stored from row `top` on."""
        down, right = (cols, rows) if self.transposed else (rows, cols)
        box = (top + down[0], top + down[1]), right
        return Block(*box, (start, start + rows[1] - rows[0]), whole, view)

    def _pieces(
        self, heads: tuple[int, ...]
    ) -> Iterator[tuple[Interval, Interval, tuple[int, int] | None]]:
        """Rows and columns in (d_out, d_in) of what is stepped, with the shape it is cut from."""
        for index, (rows, cols) in enumerate(self._parts):
            whole = rows[1] - rows[0], cols[1] - cols[0]
            if not heads[index]:
                if self.interleaved:
                    raise ValueError(
                        f"{self.name}: per head, each interleaved matrix needs heads, got "
                        f"{self.heads}"
                    )
                yield rows, cols, None
                continue
            for head in range(heads[index]):
                if self.head_axis == 1:
                    yield rows, _share(cols, heads[index], head), whole
                else:
                    yield self._stored(rows, heads[index], head), cols, whole

    def _stored(self, rows: Interval, heads: int, head: int) -> Interval:
        """Rows of one head's share of a part, where they are stored."""
        if not self.interleaved:
            return _share(rows, heads, head)
        stretch, place = divmod(head, heads // self.interleaved)
        share = (rows[1] - rows[0]) // self.interleaved
        start = stretch * (self.matrix[0] // self.interleaved) + rows[0] // self.interleaved
        return _share((start, start + share), heads // self.interleaved, place)

    def _kernels(self) -> tuple[Block, ...]:
        """Blocks of a convolution: one, or one a group of channels."""
        depth, positions = self.shape[1], prod(self.shape[2:])
        view, found, start = View(depth=depth, by_position=self.by_position), [], 0
        for rows, _ in self._parts:
            count = (rows[1] - rows[0]) * (positions if self.by_position else 1)
            box = (rows[0] * depth, rows[1] * depth), (0, positions)
            found.append(Block(*box, (start, start + count), None, view))
            start += count
        return tuple(found)


def _share(interval: Interval, count: int, index: int) -> Interval:
    """One of `count` equal pieces of an interval."""
    step = (interval[1] - interval[0]) // count
    return interval[0] + index * step, interval[0] + (index + 1) * step
