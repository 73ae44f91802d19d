import math
from dataclasses import dataclass

from geon.optim.norms.rownorm import RowWise


@dataclass(frozen=True)
class ColNorm(RowWise):
    """1 -> RMS norm of an embedding: the largest RMS of a token vector.

    The map from one-hot tokens to vectors is (d, vocab), and its columns are the token vectors;
    torch stores it transposed, (vocab, d), so here they are the rows.

    Source: Pethick et al., arXiv 2502.07529, Table 2.
    """

    def row_radius(self, shape: tuple[int, ...]) -> float:
        """sqrt(d): RMS 1."""
        return math.sqrt(shape[-1])
