"""A matrix to step: what its rule needs of it, and who stores what. No torch in here."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from geon.optim.costs import Cost
from geon.optim.norms import Reach
from geon.optim.shard.layout import Holding, Interval, Layout, Region, holding
from geon.optim.views import Form, View

FP32 = 4
"""Bytes of a weight, a sum or a coefficient on the wire; updates and directions may be 2."""


class Sums(NamedTuple):
    """What a step takes that needs sums over ranks, and not the whole matrix.

    Attributes:
        kind: name of the transport: gram, or norms.
        down: words a rank sends to the owner; norms: for each row.
        up: words a rank receives from the owner; norms: for each row.
        owner_cost: on the owner.
        shared_cost: over all ranks, each in proportion to what it holds.
    """

    kind: str
    down: int
    up: int
    owner_cost: Cost
    shared_cost: Cost


@dataclass(frozen=True)
class Matrix:
    """One matrix to step: a parameter, one of the parts fused in it, or a head's block.

    Attributes:
        param: name of the parameter.
        box: rows and columns of the parameter that are this matrix.
        layout: of the parameter.
        route: name of the param group that steps it.
        reach: how much must be whole on a rank.
        operands: tensors a step needs whole: 1 (the update), or 2 (the weight too).
        wire_bytes: bytes of one entry of an update or direction on the wire; weights take 4.
        cost: of the step on the whole matrix.
        orthogonalizes: whether the step takes a polar factor.
        scale: size of this matrix over the one that its rule gives to a matrix of its shape; not 1
            for a head's block only.
        sums: the form that needs sums alone, if the rule has one.
        row_states: numbers a row that the rule keeps, which every rank gets with the result.
        view: how matrices lie in the box, where it is not one itself: a rule then steps several.
        states: interval of the parameter's row states.
    """

    param: str
    box: Region
    layout: Layout
    route: str
    reach: Reach
    operands: int
    wire_bytes: int
    cost: Cost
    orthogonalizes: bool
    scale: float = 1.0
    sums: Sums | None = None
    row_states: int = 0
    view: View = View()
    states: Interval = (0, 0)

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

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Shape of the whole matrix, as it is stored."""
        return self.box.shape

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """How many matrices of which shape a rule steps: one of `shape`, if the view is plain."""
        return self.view.forms(self.shape)

    @property
    def count(self) -> int:
        """Number of matrices that a rule steps."""
        return sum(form.count for form in self.forms)

    @property
    def state_rows(self) -> int:
        """Length of each of its row states."""
        return self.states[1] - self.states[0]

    @cached_property
    def plain(self) -> bool:
        """Whether the box is the one matrix that a rule steps."""
        return self.view.plain

    @cached_property
    def kind(self) -> Hashable:
        """Key that matrices have in common whose steps may be taken together."""
        return self.route, self.shape, None if self.plain else self.view, self.scale

    @cached_property
    def holding(self) -> Holding:
        """Which rank stores what of the matrix."""
        return holding(self.layout, self.box)

    @property
    def words_in(self) -> tuple[int, ...]:
        """Bytes of an entry of each operand on its way to the rank that computes."""
        return (self.wire_bytes, FP32)[: self.operands]

    @property
    def bytes_out(self) -> int:
        """Bytes an entry of the result takes: a direction, or a new weight."""
        return FP32 if self.operands == 2 else self.wire_bytes

    @cached_property
    def fits(self) -> bool:
        """Whether each rank that stores any of the matrix has all that a step must see at once."""
        if self.row_states and len(self.holding.of) < self.layout.ranks:
            return False
        if self.reach is Reach.MATRIX:
            return self.holding.is_whole
        width = (0, self.shape[1])
        return self.reach is Reach.ENTRY or all(
            piece.region.cols == width for own in self.holding.pieces for piece in own
        )

    @cached_property
    def holders(self) -> list[int]:
        """Ranks that store most of the matrix: as owners, they need the least sent."""
        most = max(self.holding.words)
        return [rank for rank, words in enumerate(self.holding.words) if words == most]

    def share(self, rank: int) -> float:
        """Part of the matrix's entries that `rank` stores."""
        return self.holding.words[rank] / (self.shape[0] * self.shape[1])

    @property
    def copies(self) -> float:
        """How often the matrix's entries are stored, over all ranks."""
        return sum(self.holding.words) / (self.shape[0] * self.shape[1])
