"""What the exchange asks of a step: operands, directions, sums, and writing the weights."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geon.optim.norms.rownorm import RowWise
from geon.optim.readings import Readings
from geon.optim.rule import Rule
from geon.optim.shard import Job, Matrix, Piece, Transport, view
from geon.optim.solvers.sums import row_direction, row_lengths, row_sums


class MatrixWork:
    """One step of every steepest group, on flat local storage.

    Attributes:
        updates: averaged gradients by parameter, flat, fp32.
        weights: weights by parameter, flat, in their own dtype; written in place.
        rules: by group name.
        lrs: by group name; a group at 0 is not written.
    """

    def __init__(
        self,
        updates: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        rules: Mapping[str, Rule],
        lrs: Mapping[str, float],
        row_state: Callable[[Matrix], Tensor],
        readings: Readings,
    ) -> None:
        self.updates = updates
        self.weights = weights
        self.rules = rules
        self.lrs = lrs
        self.row_state = row_state
        self.readings = readings
        self._wide: dict[str, Tensor] = {}

    def operand(self, matrix: Matrix, index: int) -> Tensor:
        """The update or, in fp32, the weight."""
        if index == 0:
            return self.updates[matrix.param]
        weight = self.weights[matrix.param]
        if weight.dtype == torch.float32:
            return weight
        if matrix.param not in self._wide:
            self._wide[matrix.param] = weight.float()
        return self._wide[matrix.param]

    def solve(self, jobs: Sequence[Job], operands: tuple[Tensor, ...], rank: int) -> Tensor:
        """Directions, or new weights on a manifold, of a batch.

        A rule reads the size of a matrix off its shape, but a head's block has the size that it
        has in the whole matrix (`block_scale`). So the rule steps it in units of its scale: a
        direction is multiplied by it; a weight is divided by it before, and multiplied after.
        """
        matrix = jobs[0].matrix
        rule, scale = self.rules[matrix.rule], matrix.scale
        if matrix.operands == 1:
            found = self._divided(jobs, rule.solve(operands[0], None, matrix.shape).direction)
            return found if scale == 1.0 else found * scale
        update, weight = operands
        unit = weight if scale == 1.0 else weight / scale
        solution = rule.solve(update, unit)
        # Where several ranks compute the same, its owner takes note of it.
        own = [i for i, job in enumerate(jobs) if job.owner == rank]
        if own:
            self.readings.take(rule, update, unit, solution, own)
        direction = self._divided(jobs, solution.direction)
        moved = rule.move(unit, direction, self.lrs[matrix.rule])
        return _rescaled(weight, unit, moved, scale)

    def _divided(self, jobs: Sequence[Job], directions: Tensor) -> Tensor:
        """Directions with their rows divided, where the rule does that."""
        matrix = jobs[0].matrix
        rule = self.rules[matrix.rule]
        if rule.even_rows:
            return rule.level_rows(directions)
        if not matrix.row_state or self.lrs[matrix.rule] == 0.0:
            return directions
        pairs = zip(jobs, directions.unbind(), strict=True)
        return torch.stack(
            [rule.divide_rows(one, self.row_state(job.matrix)) for job, one in pairs]
        )

    def write(self, matrix: Matrix, piece: Piece, result: Tensor) -> None:
        """Move a piece of the weight by a piece of a direction, or replace it."""
        lr = self.lrs[matrix.rule]
        if lr == 0.0:
            return
        weight = view(self.weights[matrix.param], piece)
        if matrix.operands == 1:
            self.rules[matrix.rule].move_(weight, result, lr)
        else:
            weight.copy_(result)

    # Steps from sums.

    def partial(self, jobs: Sequence[Job], rank: int) -> list[Tensor]:
        """Packed sums of this rank's part of each matrix."""
        found: dict[int, Tensor] = {}
        for members in _alike(jobs, rank):
            matrix = members[0].matrix
            if members[0].transport is Transport.NORMS:
                for job in members:
                    found[id(job)] = self._row_sums(job.matrix, rank)
                continue
            update, weight = self._slabs(members, rank)
            sums = self._form(matrix).partial(update, _unit(weight, matrix), matrix.shape)
            found.update((id(job), own) for job, own in zip(members, sums.unbind(), strict=True))
        return [found[id(job)] for job in jobs]

    def combine(
        self, jobs: Sequence[Job], sums: Sequence[dict[int, Tensor]], rank: int
    ) -> list[dict[int, Tensor]]:
        """Coefficients by receiver. Sums are added in the order of ranks."""
        if jobs[0].transport is Transport.NORMS:
            pairs = zip(jobs, sums, strict=True)
            return [self._row_norms(job.matrix, by_rank) for job, by_rank in pairs]
        back: list[dict[int, Tensor]] = [{} for _ in jobs]
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, by_rank in enumerate(sums):
            together[tuple(sorted(by_rank))].append(i)
        for ranks, members in together.items():
            matrix = jobs[members[0]].matrix
            stacked = torch.stack([torch.stack([sums[i][r] for i in members]) for r in ranks])
            words, fell_back = self._form(matrix).combine(
                stacked, matrix.shape, self.lrs[matrix.rule]
            )
            if fell_back is not None:
                self.readings.count(fell_back)
            for i, one in zip(members, words.unbind(), strict=True):
                back[i] = dict.fromkeys(jobs[i].matrix.holding.of, one)
        return back

    def apply(self, jobs: Sequence[Job], coefficients: Sequence[Tensor], rank: int) -> None:
        """Write this rank's part of each matrix."""
        words = {id(job): own for job, own in zip(jobs, coefficients, strict=True)}
        for members in _alike(jobs, rank):
            matrix = members[0].matrix
            if members[0].transport is Transport.NORMS:
                for job in members:
                    self._apply_row_norms(job.matrix, words[id(job)], rank)
                continue
            update, weight = self._slabs(members, rank)
            stacked = torch.stack([words[id(job)] for job in members])
            unit = _unit(weight, matrix)
            found = self._form(matrix).apply(stacked, update, unit, matrix.shape)
            if weight is None or unit is None:
                found = found if matrix.scale == 1.0 else found * matrix.scale
            else:
                found = _rescaled(weight, unit, found, matrix.scale)
            wide = matrix.shape[0] < matrix.shape[1]
            for job, own in zip(members, (found.mT if wide else found).unbind(), strict=True):
                self.write(job.matrix, job.matrix.holding.pieces[rank][0], own)

    def _form(self, matrix: Matrix) -> Any:
        return self.rules[matrix.rule].gram_form(matrix.shape)

    def _slabs(self, jobs: Sequence[Job], rank: int) -> tuple[Tensor, Tensor | None]:
        """Own parts of a batch, updates and weights, oriented long x short."""
        matrix = jobs[0].matrix
        stacked = [
            torch.stack(
                [view(self.operand(j.matrix, k), j.matrix.holding.pieces[rank][0]) for j in jobs]
            )
            for k in range(matrix.operands)
        ]
        if matrix.shape[0] < matrix.shape[1]:
            stacked = [one.mT for one in stacked]
        return stacked[0], stacked[1] if matrix.operands == 2 else None

    def _row_sums(self, matrix: Matrix, rank: int) -> Tensor:
        flat, width = self.operand(matrix, 0), (0, matrix.shape[1])
        parts = [
            row_sums(view(flat, piece)).reshape(-1)
            for piece in matrix.holding.pieces[rank]
            if piece.region.cols != width
        ]
        return torch.cat(parts) if parts else flat.new_empty(0)

    def _row_norms(self, matrix: Matrix, sums: dict[int, Tensor]) -> dict[int, Tensor]:
        some = next(iter(sums.values()))
        spread = some.new_zeros(len(sums), matrix.shape[0], 2)
        for i, rank in enumerate(sorted(sums)):
            at = 0
            for start, stop in matrix.shared_rows(rank):
                count = 2 * (stop - start)
                spread[i, start:stop] = sums[rank][at : at + count].view(-1, 2)
                at += count
        lengths, back = row_lengths(spread), {}
        for rank in matrix.holding.of:
            parts = [lengths[start:stop] for start, stop in matrix.shared_rows(rank)]
            back[rank] = torch.cat(parts) if parts else lengths[:0]
        return back

    def _apply_row_norms(self, matrix: Matrix, lengths: Tensor, rank: int) -> None:
        rule, width, at = self.rules[matrix.rule], (0, matrix.shape[1]), 0
        assert isinstance(rule.norm, RowWise)
        for piece in matrix.holding.pieces[rank]:
            own = view(self.operand(matrix, 0), piece)
            if piece.region.cols == width:
                found = rule.norm.lmo(own, matrix.shape)
            else:
                count = piece.region.shape[0]
                found = row_direction(rule.norm, own, lengths[at : at + count], matrix.shape)
                at += count
            self.write(matrix, piece, found if matrix.scale == 1.0 else found * matrix.scale)


def _unit(weight: Tensor | None, matrix: Matrix) -> Tensor | None:
    """Weights in units of their scale."""
    return weight if weight is None or matrix.scale == 1.0 else weight / matrix.scale


def _rescaled(weight: Tensor, unit: Tensor, moved: Tensor, scale: float) -> Tensor:
    """Back from units of the scale; a weight that did not move is not rounded."""
    return moved if scale == 1.0 else weight.where(moved == unit, moved * scale)


def _alike(jobs: Sequence[Job], rank: int) -> list[list[Job]]:
    """Jobs of one rule and shape whose parts on this rank have one shape."""
    found: dict[object, list[Job]] = defaultdict(list)
    for job in jobs:
        m = job.matrix
        own = tuple(piece.region.shape for piece in m.holding.pieces[rank])
        found[m.rule, m.shape, m.scale, job.transport, own].append(job)
    return list(found.values())
