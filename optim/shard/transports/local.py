from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

from geon.optim.costs import Cost
from geon.optim.norms import Reach
from geon.optim.shard.layout import Piece
from geon.optim.shard.matrix import Matrix
from geon.optim.shard.transports.base import Job, Letters, Offer, Transport, Work


class Local(Transport):
    """Every rank already holds what it needs. Nothing is sent, and copies are computed twice."""

    name = "local"
    owned = False

    def offer(self, matrix: Matrix, reproducible: bool) -> Offer:
        """Offer to take what each rank holds enough of; ALWAYS if nothing is computed twice."""
        if not matrix.fits:
            return Offer.NO
        once = all(len(ranks) == 1 for ranks in matrix.holding.copies)
        return Offer.ALWAYS if once or matrix.reach is not Reach.MATRIX else Offer.MAYBE

    def shared_cost(self, matrix: Matrix) -> Cost:
        """Cost of the whole step."""
        return matrix.cost

    def compute(self, jobs: Sequence[Job], work: Work, inbox: Letters) -> Letters:
        """Step this rank's pieces, those of equal shapes together."""
        alike: dict[Hashable, list[tuple[Job, Piece]]] = defaultdict(list)
        for job in jobs:
            matrix = job.matrix
            if not work.moves(matrix):
                continue
            for piece in matrix.holding.pieces[work.rank]:
                shape = piece.region.shape
                key = matrix.kind, shape, job if work.alone else None
                alike[key].append((job, piece))
        for members in alike.values():
            operands = [
                torch.stack([work.operand(job.matrix, k, piece) for job, piece in members])
                for k in range(members[0][0].matrix.operands)
            ]
            results = work.solve([job for job, _ in members], operands).unbind()
            pairs = zip(members, results, strict=True)
            work.write((job.matrix, piece, result) for (job, piece), result in pairs)
        return {}
