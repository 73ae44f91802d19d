"""How matrices lie in a box of storage that is not itself one matrix (d_out, d_in)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """So many matrices of one shape."""

    count: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class View:
    """What a rule sees of a box (rows, cols) of a parameter; by default the box itself.

    Attributes:
        transposed: the box is stored (d_in, d_out): Conv1D of transformers, `x @ W`.
        shares: rows of each matrix in one stretch of d_out, where matrices are interleaved: with
            (64, 64, 64) come 64 rows of the first, 64 of the second and 64 of the third, again and
            again. Empty for one matrix.
        depth: input channels of a convolution, whose weight (d_out, depth, positions) is stored as
            (d_out depth, positions); 0 for none.
        by_position: each position of the kernel is a matrix (d_out, depth) of its own; otherwise
            the kernel is one matrix (d_out, depth positions).
    """

    transposed: bool = False
    shares: tuple[int, ...] = ()
    depth: int = 0
    by_position: bool = False

    @property
    def plain(self) -> bool:
        """Whether the box is the matrix."""
        return self == _PLAIN

    def forms(self, box: tuple[int, int]) -> tuple[Form, ...]:
        """The matrices in a box of this shape, in the order of `open`."""
        rows, cols = box[::-1] if self.transposed else box
        if self.depth:
            d_out = rows // self.depth
            if self.by_position:
                return (Form(cols, (d_out, self.depth)),)
            return (Form(1, (d_out, self.depth * cols)),)
        if not self.shares:
            return (Form(1, (rows, cols)),)
        stretches = rows // sum(self.shares)
        return tuple(Form(n, (stretches * share, cols)) for n, share in self._runs)

    @property
    def _runs(self) -> list[tuple[int, int]]:
        """Equal shares that follow each other: how many, and of how many rows."""
        return [(len(list(run)), share) for share, run in groupby(self.shares)]

    def open(self, boxes: Tensor) -> list[Tensor]:
        """The matrices of each form, (batch count, d_out, d_in), of boxes (batch, rows, cols).

        Contiguous: products of the same numbers in other strides differ in their last bits.
        """
        if self.plain:
            return [boxes]
        return [matrices.contiguous() for matrices in self._open(boxes)]

    def _open(self, boxes: Tensor) -> list[Tensor]:
        stored = boxes.mT if self.transposed else boxes
        batch, rows, cols = stored.shape
        if self.depth:
            kernel = stored.reshape(batch, rows // self.depth, self.depth, cols)
            if self.by_position:
                return [kernel.permute(0, 3, 1, 2).flatten(0, 1)]
            return [kernel.flatten(2)]
        if not self.shares:
            return [stored]
        stretches = stored.reshape(batch, -1, sum(self.shares), cols)
        parts = torch.split(stretches, [n * share for n, share in self._runs], dim=2)
        return [
            part.reshape(batch, -1, n, share, cols).transpose(1, 2).reshape(batch * n, -1, cols)
            for part, (n, share) in zip(parts, self._runs, strict=True)
        ]

    def close(self, found: Sequence[Tensor], box: tuple[int, int]) -> Tensor:
        """Boxes (batch, rows, cols) of the matrices of each form: what `open` came from."""
        if self.plain:
            return found[0]
        forms = self.forms(box)
        batch = len(found[0]) // forms[0].count
        if self.depth:
            d_out, positions = box[0] // self.depth, box[1]
            if self.by_position:
                kernel = found[0].view(batch, positions, d_out, self.depth).permute(0, 2, 3, 1)
                return kernel.reshape(batch, *box).contiguous()
            return found[0].reshape(batch, *box)
        stored = found[0]
        if self.shares:
            parts = [
                one.view(batch, n, -1, share, one.shape[-1]).transpose(1, 2).flatten(2, 3)
                for one, (n, share) in zip(found, self._runs, strict=True)
            ]
            stored = torch.cat(parts, dim=2).flatten(1, 2)
        return (stored.mT if self.transposed else stored).contiguous()

    def scale(self, box: tuple[int, int]) -> float:
        """Size of each matrix in a sum over positions: 1 / positions of a kernel, otherwise 1.

        A convolution adds one product a position, so steps of norm 1 / k^2 each make one of norm 1
        (Pethick et al., arXiv 2502.07529, appendix on convolutions).
        """
        return 1.0 / box[1] if self.by_position else 1.0

    def describe(self) -> str:
        """Describe the view in a word or two, for tables; nothing for a plain one."""
        words = ["transposed"] if self.transposed else []
        words += ["interleaved"] if self.shares else []
        if self.depth:
            words += ["kernel by position" if self.by_position else "kernel"]
        return ", ".join(words)


_PLAIN = View()
