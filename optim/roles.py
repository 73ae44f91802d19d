"""What a parameter is to its model: the role decides which rule steps it."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a parameter does. Declared by the model, read by the router."""

    EMBEDDING = "embedding"
    """Rows are vectors looked up by token or position: stored (vocab, d)."""
    HEAD = "head"
    """Maps the last activation to logits: stored (vocab, d)."""
    TIED = "tied"
    """One weight that is both embedding and head."""
    HIDDEN = "hidden"
    """A matrix (d_out, d_in) between activations; `ParamInfo.splits` if several are fused."""
    GAIN = "gain"
    BIAS = "bias"
    SCALAR = "scalar"


Interval = tuple[int, int]
MATRIX_ROLES = frozenset({Role.EMBEDDING, Role.HEAD, Role.TIED, Role.HIDDEN})


@dataclass(frozen=True)
class Block:
    """One matrix to step inside a parameter: half-open intervals of its rows and columns.

    Attributes:
        rows: of the parameter.
        cols: of the parameter.
        whole: shape of the matrix that a head's block is cut from; otherwise the block's own.
    """

    rows: Interval
    cols: Interval
    whole: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the block: rows and columns."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the block in the parameter."""
        return slice(*self.rows), slice(*self.cols)


@dataclass(frozen=True)
class ParamInfo:
    """One parameter as its model declares it.

    Attributes:
        name: fully qualified name, as in `named_parameters()`.
        shape: shape of the whole (unsharded) parameter; hidden matrices may be stored in batches,
            (batch, d_out, d_in), e.g. one for each expert, and are stepped one by one.
        role: what the parameter does.
        splits: rows of each matrix that is fused along dimension 0, e.g. (d, d, d) for q, k, v;
            empty for a parameter that is one matrix. Every rule treats the parts separately.
        heads: attention heads that share each part equally, in order; 0 when it has none.
        head_axis: 0 when a head owns rows (q, k, v), 1 when it owns columns (the output).
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    splits: tuple[int, ...] = ()
    heads: int = 0
    head_axis: int = 0

    def __post_init__(self) -> None:
        batched = self.role is Role.HIDDEN and len(self.shape) == 3
        if self.role in MATRIX_ROLES and len(self.shape) != 2 and not batched:
            raise ValueError(
                f"{self.name}: role '{self.role}' needs a matrix (d_out, d_in), got {self.shape}"
            )
        if batched and self.splits:
            raise ValueError(
                f"{self.name}: splits {self.splits} of a batch of matrices {self.shape}: store "
                "fused matrices as more entries of the batch instead"
            )
        if self.splits and sum(self.splits) != self.shape[0]:
            raise ValueError(
                f"{self.name}: splits {self.splits} sum to {sum(self.splits)}, "
                f"but dimension 0 has {self.shape[0]} rows"
            )
        if self.heads:
            self._check_heads()

    def _check_heads(self) -> None:
        if self.heads < 0 or self.head_axis not in (0, 1) or len(self.shape) != 2:
            raise ValueError(
                f"{self.name}: {self.heads} heads on axis {self.head_axis} of a weight of shape "
                f"{self.shape}: heads share the rows (axis 0) or columns (axis 1) of a matrix"
            )
        for size in (self.splits or self.shape[:1]) if self.head_axis == 0 else self.shape[1:]:
            if size % self.heads:
                what = ("rows", "columns")[self.head_axis]
                raise ValueError(
                    f"{self.name}: {size} {what} do not divide into {self.heads} heads"
                )

    @property
    def numel(self) -> int:
        """Number of entries of the whole parameter."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape as a matrix: vectors and scalars are one row, batches lie one below the other."""
        if len(self.shape) >= 2:
            return self.numel // self.shape[-1], self.shape[-1]
        return 1, self.numel

    @property
    def parts(self) -> tuple[Interval, ...]:
        """Row interval (start, stop) of each fused or batched matrix; one when there is one."""
        bounds = [0]
        batch = self.shape[:1] if len(self.shape) == 3 else ()
        alone = (self.matrix_shape[0],) if not batch else (self.shape[1],) * batch[0]
        for rows in self.splits or alone:
            bounds.append(bounds[-1] + rows)
        return tuple(zip(bounds[:-1], bounds[1:], strict=True))

    def blocks(self, per_head: bool) -> tuple[Block, ...]:
        """The matrices to step: the fused parts, or with `per_head` each head's share of them.

        A parameter without heads gives its parts either way.
        """
        heads, width = (self.heads if per_head else 0) or 1, self.matrix_shape[1]
        found = []
        for top, bottom in self.parts:
            whole = (bottom - top, width)
            for h in range(heads):
                rows, cols = (top, bottom), (0, width)
                if self.head_axis == 0:
                    rows = _share(rows, heads, h)
                else:
                    cols = _share(cols, heads, h)
                found.append(Block(rows, cols, whole))
        return tuple(found)


def _share(interval: Interval, count: int, index: int) -> Interval:
    """One of `count` equal pieces of an interval."""
    step = (interval[1] - interval[0]) // count
    return interval[0] + index * step, interval[0] + (index + 1) * step
