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


MATRIX_ROLES = frozenset({Role.EMBEDDING, Role.HEAD, Role.TIED, Role.HIDDEN})


@dataclass(frozen=True)
class ParamInfo:
    """One parameter as its model declares it.

    Attributes:
        name: fully qualified name, as in `named_parameters()`.
        shape: shape of the whole (unsharded) parameter.
        role: what the parameter does.
        splits: rows of each matrix that is fused along dimension 0, e.g. (d, d, d) for q, k, v;
            empty for a parameter that is one matrix. Every rule treats the parts separately.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    splits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role in MATRIX_ROLES and len(self.shape) != 2:
            raise ValueError(
                f"{self.name}: role '{self.role}' needs a matrix (d_out, d_in), got {self.shape}"
            )
        if self.splits and sum(self.splits) != self.shape[0]:
            raise ValueError(
                f"{self.name}: splits {self.splits} sum to {sum(self.splits)}, "
                f"but dimension 0 has {self.shape[0]} rows"
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
        """Shape as a matrix: vectors and scalars are one row."""
        if len(self.shape) == 2:
            return self.shape[0], self.shape[1]
        return 1, self.numel

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Row interval (start, stop) of each fused matrix; one interval when nothing is fused."""
        bounds = [0]
        for rows in self.splits or (self.matrix_shape[0],):
            bounds.append(bounds[-1] + rows)
        return tuple(zip(bounds[:-1], bounds[1:], strict=True))
