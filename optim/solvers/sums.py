"""Steps that need sums over the ranks, and not the whole matrix: small in, small out.

Ranks cut the long side. Each takes products of its own rows, short x short; their sums go to one
rank, which returns short x short coefficients, and each rank applies them to its own rows. What
travels does not depend on the long side, nor on what the solver does in between.

Sums are scale safe: each rank divides by a power of two near its largest entry, and sends that too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from geon.optim.costs import Cost, products
from geon.optim.linalg import Precision, eye, product, sym, trace
from geon.optim.manifolds import Euclidean, Manifold, Stiefel
from geon.optim.manifolds.stiefel import TWO_STEPS_ABOVE
from geon.optim.norms import Norm, RowWise, Spectral
from geon.optim.polar.gram import polar_root
from geon.optim.solvers import lgm
from geon.optim.solvers.stiefel_spectral import Ladder

# Scales stay within 2^-100..2^100, so that neither a square of what is divided by them nor a
# coefficient divided by them leaves the range of fp32.
_EXPONENT = 100.0


class GramForm(ABC):
    """A step from sums of products over the long side.

    Shapes: slabs (batch, own long, short), the rank's rows of the oriented matrix; sums
    (batch, down) and coefficients (batch, up), packed in fp32. `shape` is that of the whole matrix.
    """

    @abstractmethod
    def down(self, short: int) -> int:
        """Number of words of a rank's sums."""

    @abstractmethod
    def up(self, short: int) -> int:
        """Number of words of the coefficients."""

    @abstractmethod
    def owner_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost on the owner, from sums to coefficients."""

    @abstractmethod
    def shared_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost of the products for sums and of applying coefficients, over all ranks."""

    @abstractmethod
    def partial(self, update: Tensor, weight: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Sums of this rank's rows."""

    @abstractmethod
    def combine(
        self, sums: Tensor, shape: tuple[int, int], lr: float
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients from the sums of all ranks (ranks, batch, down), and where it fell back."""

    @abstractmethod
    def apply(
        self,
        coefficients: Tensor,
        update: Tensor,
        weight: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        """This rank's rows of the direction, or of the new weight on a manifold."""


def gram_form(
    norm: Norm, manifold: Manifold, ladder: Ladder, shape: tuple[int, int]
) -> GramForm | None:
    """The form of a pair for matrices of a shape, if it has one.

    Squares on Stiefel have none: their closed form needs the weight as well, and costs less whole.
    """
    if not isinstance(norm, Spectral):
        return None
    if isinstance(manifold, Euclidean):
        return GramPolar(norm)
    if not isinstance(manifold, Stiefel) or shape[0] == shape[1]:
        return None
    return GramStiefel(norm, manifold, ladder) if _by_lgm(ladder) else None


def _words(precision: Precision | None) -> str:
    return (precision or Precision.FP32).value


def _by_lgm(ladder: Ladder) -> bool:
    return ladder.method == "lgm" and ladder.form != "rect"


@dataclass(frozen=True)
class GramPolar(GramForm):
    """Muon and Scion: X (X^T X)^(-1/2) from the Gram, by the polynomial that `polar` applies to X.

    In exact arithmetic the same as `Spectral.lmo`. The Gram squares the condition number, so it
    is in fp32 or bf16x3 whatever the polar factor is in, and singular values below 5e-4 of the
    largest end a little lower.
    """

    norm: Spectral

    @property
    def _precision(self) -> Precision | None:
        chosen = self.norm.polar.precision
        return chosen if chosen is Precision.BF16X3 else None

    def down(self, short: int) -> int:
        """Number of words of a rank's sums: the Gram, symmetric, and a scale."""
        return _packed(short) + 1

    def up(self, short: int) -> int:
        """Number of words of the coefficients: the inverse root, symmetric."""
        return _packed(short)

    def owner_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost on the owner: about four products of n x n a polar step."""
        steps, short = self.norm.polar.plan()[0], min(shape)
        flops = (4 * steps - 3) * 2 * short**3
        return products(flops, _words(self._precision), 20 * steps * short**2, 20 * steps)

    def shared_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost of two long products: one for the sums, one to apply coefficients."""
        entries = shape[0] * shape[1]
        flops = 4 * min(shape) * entries
        return products(flops, _words(self._precision), 16 * entries, 28)

    def partial(self, update: Tensor, weight: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Sums of this rank's rows: Gram and scale."""
        scale = _power_of_two(update)
        x = update / scale
        return torch.cat([pack(product(x.mT, x, self._precision)), scale[..., 0]], dim=-1)

    def combine(
        self, sums: Tensor, shape: tuple[int, int], lr: float
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients (X^T X)^(-1/2), in units of the update."""
        total, scale = _add_up(sums, (_packed(min(shape)), 2))
        root = polar_root(unpack(total, min(shape)), *self.norm.polar.plan(), self._precision)
        return pack(root / scale), None

    def apply(
        self,
        coefficients: Tensor,
        update: Tensor,
        weight: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        """This rank's rows of the direction: X Q, scaled as the norm says."""
        root = unpack(coefficients, min(shape)) * self.norm.factor(shape)
        return product(update, root, self._precision)


@dataclass(frozen=True)
class GramStiefel(GramForm):
    """Manifold Muon by LGM: direction, retraction and all from U^T U, U^T G and G^T G.

    The new weight is U M1 + G M2, M1 and M2 short x short: the retraction is a polynomial in the
    Gram of U - lr A, which follows from the three sums.
    """

    norm: Spectral
    manifold: Stiefel
    ladder: Ladder

    def down(self, short: int) -> int:
        """Number of words of a rank's sums: two symmetric Grams, a cross product and a scale."""
        return 2 * _packed(short) + short**2 + 1

    def up(self, short: int) -> int:
        """Number of words of the coefficients: M1 and M2."""
        return 2 * short**2

    def owner_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost on the owner: LGM's products of n x n, tangency, the new Gram, two cubic steps."""
        short, ratio, refine = min(shape), max(shape) / min(shape), self.ladder.refine
        flops = 2 * short**3 * (lgm.gram_products(ratio, refine) - 7 * ratio + 10)
        words = (510 + 268 * refine) * short**2
        return products(flops, _words(self.ladder.precision), words, 468 + 187 * refine)

    def shared_cost(self, shape: tuple[int, int]) -> Cost:
        """Cost of five long products: three for the sums, two to apply coefficients."""
        entries = shape[0] * shape[1]
        flops = 10 * min(shape) * entries
        return products(flops, _words(self.ladder.precision), 23 * entries, 30)

    def partial(self, update: Tensor, weight: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Sums of this rank's rows: U^T U, G^T G, U^T G and the scale of G."""
        assert weight is not None
        precision, scale = self.ladder.precision, _power_of_two(update)
        u, x = weight / self.manifold.scale(shape), update / scale
        grams = [pack(product(y.mT, y, precision)) for y in (u, x)]
        cross = product(u.mT, x, precision).flatten(-2)
        return torch.cat([*grams, cross, scale[..., 0]], dim=-1)

    def combine(
        self, sums: Tensor, shape: tuple[int, int], lr: float
    ) -> tuple[Tensor, Tensor | None]:
        """Coefficients M1, M2 in units of the stored weight and update; where LGM fell back."""
        n, precision = min(shape), self.ladder.precision
        half = _packed(n)
        total, scale = _add_up(sums, (half, 0), (half, 2), (n * n, 1))
        uu, gg = unpack(total[..., :half], n), unpack(total[..., half : 2 * half], n)
        b = total[..., 2 * half :].reshape(*total.shape[:-1], n, n)
        energy = trace(gg)
        one = torch.where(energy > 0, (n / energy.clamp_min(1e-30)).sqrt(), 0.0)
        b, gg = b * one, gg * one**2
        left, right, fell_back = lgm.coefficients(
            b, gg, uu, max(shape) / n, self.ladder.refine, precision
        )
        # Tangent to rounding, as in `lgm.gram`: A - U sym(U^T A), where U^T A = U^T U L1 + B L2.
        along = product(uu, left, precision) + product(b, right, precision)
        one_matrix = eye(left)
        first, second = one_matrix - lr * (left - sym(along)), -lr * right
        cross = product(first.mT, product(b, second, precision), precision)
        gram = product(first.mT, product(uu, first, precision), precision) + cross + cross.mT
        gram = gram + product(second.mT, product(gg, second, precision), precision)
        for _ in range(2 if lr > TWO_STEPS_ABOVE else 1):
            cubic = 1.5 * one_matrix - 0.5 * sym(gram)
            first, second = product(first, cubic, precision), product(second, cubic, precision)
            gram = product(cubic, product(gram, cubic, precision), precision)
        # What has no gradient stays exactly where it is.
        still = energy == 0
        first, second = torch.where(still, one_matrix, first), torch.where(still, 0.0, second)
        second = second * (self.manifold.scale(shape) * one / scale)
        return torch.cat([first.flatten(-2), second.flatten(-2)], dim=-1), fell_back

    def apply(
        self,
        coefficients: Tensor,
        update: Tensor,
        weight: Tensor | None,
        shape: tuple[int, int],
    ) -> Tensor:
        """This rank's rows of the new weight: W M1 + G M2."""
        assert weight is not None
        short = min(shape)
        both = coefficients.reshape(*coefficients.shape[:-1], 2, short, short)
        first, second = both.unbind(-3)
        precision = self.ladder.precision
        return product(weight, first, precision) + product(update, second, precision)


@dataclass(frozen=True)
class RowForm:
    """Row-wise norms where ranks hold parts of rows: squares down, lengths back."""

    norm: RowWise

    def partial(self, rows: Tensor) -> Tensor:
        """(count, own columns) -> (count, 2): sum of squares over a power of two squared, and it.

        What is added up over ranks; 4 FLOPs an entry.
        """
        scale = _power_of_two(rows, dim=-1)
        return torch.cat([(rows / scale).square().sum(dim=-1, keepdim=True), scale], dim=-1)

    def combine(self, sums: Tensor) -> Tensor:
        """2-norms (count,) of rows from the sums of ranks (ranks, count, 2); 0 where absent."""
        scale = sums[..., 1].amax(dim=0)
        shares = (sums[..., 1] / torch.where(scale > 0, scale, 1.0)).square()
        return (sums[..., 0] * shares).sum(dim=0).sqrt() * scale

    def apply(self, update: Tensor, lengths: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Pieces of rows (count, own columns) scaled by the lengths of the whole rows.

        lengths: None where the rows are whole.
        """
        if lengths is None:
            return self.norm.lmo(update, shape)
        inverse = torch.where(lengths > 0, 1.0 / torch.where(lengths > 0, lengths, 1.0), 0.0)
        return update * (self.norm.row_radius(shape) * inverse)[:, None]


def pack(matrix: Tensor) -> Tensor:
    """Upper triangles of symmetric (..., n, n) as (..., n (n + 1) / 2)."""
    rows, cols = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[..., rows, cols]


def unpack(words: Tensor, n: int) -> Tensor:
    """Symmetric matrices (..., n, n) from their upper triangles, as `pack` gives them."""
    rows, cols = torch.triu_indices(n, n, device=words.device)
    full = words.new_empty(*words.shape[:-1], n, n)
    full[..., rows, cols] = words
    full[..., cols, rows] = words
    return full


def _packed(n: int) -> int:
    return n * (n + 1) // 2


def _power_of_two(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """The power of two at or below the largest magnitude, within bounds; 1 for zeros."""
    top = x.abs().amax(dim=dim, keepdim=True)
    exponent = torch.frexp(top).exponent - 1
    exponent = exponent.clamp(-int(_EXPONENT), int(_EXPONENT))
    return torch.ldexp(torch.ones_like(top), torch.where(top > 0, exponent, 0))


def _add_up(sums: Tensor, *parts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Add sums (ranks, batch, words + 1) in rank order; parts are (words, power of the scale).

    Returns: (batch, words) in units of the largest scale, and that scale (batch, 1, 1).
    """
    scales = sums[..., -1:]
    scale = scales.amax(dim=0)
    total, at = [], 0
    for words, power in parts:
        chunk = sums[..., at : at + words]
        total.append((chunk * (scales / scale) ** power).sum(dim=0) if power else chunk.sum(dim=0))
        at += words
    return torch.cat(total, dim=-1), scale[..., None]
