"""Spectral norm on the Stiefel manifold, Manifold Muon: the ladder of solvers."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from geon.errors import UsageError
from geon.optim.costs import Cost, products
from geon.optim.linalg import Precision, accurate_on, orient, orient_like, product, skew
from geon.optim.manifolds.stiefel import Stiefel, tangent_unit
from geon.optim.norms.spectral import Spectral
from geon.optim.polar import Polar, minimax, polar
from geon.optim.solvers import lgm
from geon.optim.solvers.base import Solution, Solver
from geon.optim.solvers.certificate import certify
from geon.optim.solvers.exact import certified_optimum
from geon.optim.solvers.published import dual_ascent, dual_ascent_products

METHODS = ("oneshot", "lgm", "exact", "published")
FORMS = ("auto", "gram", "rect")

# Of skew matrices: brings the descent on squares within 1e-6 of the optimum for spectra over four
# decades (tests/optim/test_manifold_muon.py).
SQUARE_STEPS = 10
SQUARE_TABLE = minimax(3e-5, SQUARE_STEPS)
PUBLISHED_STEPS = 100


@dataclass(frozen=True)
class Ladder:
    """Which solver, from cheap to exact.

    Attributes:
        method: oneshot (0.90 to 0.95 of the optimum), lgm (0.995), exact (float64 on the host:
            for tests), published (scale-normalised dual ascent: to compare with).
        refine: lgm only: refinements before the completion.
        form: lgm only: gram (fp32 or bf16x3 products of n x n) or rect (polar factors of long
            matrices, bf16 allowed); auto takes rect when polar factors are in bf16.
        precision: of the products beside polar factors. None is the operands' dtype, but bf16x3
            on an accelerator wherever polar factors are in bf16.
    """

    method: str = "lgm"
    refine: int = 0
    form: str = "auto"
    precision: Precision | None = None

    def __post_init__(self) -> None:
        for key, value, known in (("method", self.method, METHODS), ("form", self.form, FORMS)):
            if value not in known:
                raise UsageError(f"optim.solver.{key} '{value}' is not one of {', '.join(known)}")
        if self.refine < 0:
            raise UsageError(f"optim.solver.refine must be 0 or more, got {self.refine}")
        if self.precision is Precision.BF16:
            raise UsageError(
                "optim.solver.products 'bf16': the Gram form squares condition numbers and "
                "diverges in bf16; use fp32 or bf16x3, or optim.solver.form=rect"
            )


def one_shot(
    u: Tensor, grad: Tensor, polar_factor: Polar, precision: Precision | None = None
) -> Tensor:
    """P msign(P G), P the tangent projection: tangent, of norm at most 2/sqrt(3).

    0.90 to 0.95 of the optimum. The projections run in `precision`, or the dtype of `grad`,
    whatever that of the polar factor, so the result is tangent to rounding.

    Shapes: (..., long, short), u^T u = I.
    Source: SPEL, arXiv 2601.21487, with the second projection. 2/sqrt(3): write Ab = [X; Y] b in
        the basis of U, x = |Xb|; then |P A b|^2 <= ((1 + x)/2)^2 + 1 - x^2 <= 4/3.
    Cost: a polar factor and 8 l s^2 FLOPs.
    """
    return tangent_unit(u, polar_factor(tangent_unit(u, grad, precision)), precision)


def square(
    u: Tensor,
    grad: Tensor,
    polar_factor: Polar | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """U msign(skew(U^T G)): the optimum on square matrices.

    The tangent space is U times the skew matrices, and U keeps the spectral norm.

    Shapes: (..., n, n). polar_factor None: within 1e-6 of the optimum in fp32.
    Source: J. Su, kexue.fm 11215.
    Cost: a polar factor and 4 n^3 FLOPs.
    """
    k = skew(product(u.mT, grad, precision))
    factor = polar_factor(k) if polar_factor else polar(k, SQUARE_STEPS, SQUARE_TABLE)
    return product(u, skew(factor), precision)


@dataclass(frozen=True)
class StiefelSpectral(Solver):
    """Manifold Muon's direction by the ladder; squares take the closed form on every rung."""

    norm: Spectral
    manifold: Stiefel
    ladder: Ladder = field(default_factory=Ladder)

    @property
    def name(self) -> str:
        """Name of the solver: method, refinements and form."""
        chosen = self.ladder
        refined = f"({chosen.refine})" if chosen.refine else ""
        form = f" {chosen.form}" if chosen.method == "lgm" and chosen.form != "auto" else ""
        return f"{chosen.method}{refined}{form}"

    def __call__(self, grad: Tensor, weight: Tensor) -> Solution:
        """Directions of a batch of gradients by the chosen method."""
        u, g = self.manifold.unit(weight), orient(grad)
        solution = self._solve(u, g)
        direction = orient_like(solution.direction, grad) * self.norm.factor(grad.shape)
        return solution._replace(direction=direction)

    def _solve(self, u: Tensor, g: Tensor) -> Solution:
        method, polar_factor = self.ladder.method, self.norm.polar
        precision = self._precision_on(g.device)
        if u.shape[-2] == u.shape[-1] and method != "exact":
            accurate = method == "lgm" and not self._rough(g.device)
            return Solution(square(u, g, None if accurate else polar_factor, precision))
        if method == "oneshot":
            return Solution(one_shot(u, g, polar_factor, precision))
        if method == "published":
            return Solution(dual_ascent(u, g, PUBLISHED_STEPS, polar=polar_factor))
        if method == "exact":
            return Solution(_exact(u, g))
        if self._rough(g.device):
            return lgm.rectangular(u, g, self.ladder.refine, polar_factor, precision)
        return lgm.gram(u, g, self.ladder.refine, self.ladder.precision)

    def _precision_on(self, device: torch.device) -> Precision | None:
        """Arithmetic of the products beside polar factors, outside the Gram form."""
        chosen = self.ladder.precision
        if chosen is None and self.norm.polar.precision_on(device) is Precision.BF16:
            return accurate_on(device)
        return chosen

    def _rough(self, device: torch.device) -> bool:
        """Whether the rectangular form of LGM is taken on a device."""
        if self.ladder.form != "auto":
            return self.ladder.form == "rect"
        return self.norm.polar.precision_on(device) is Precision.BF16

    def cost(self, shape: tuple[int, int], device: str = "cpu") -> Cost:
        """Cost of a direction: polar factors in their arithmetic, other products in theirs.

        The words of n x n matrices and the kernels are as tests/optim/test_costs.py counts them.
        """
        precision = self._precision_on(torch.device(device)) or Precision.FP32
        short, entries, refine = min(shape), shape[0] * shape[1], self.ladder.refine
        method, ratio, cube = self.ladder.method, entries / short**2, 2 * min(shape) ** 3
        rectangular, factor = self._rough(torch.device(device)), self.norm.polar.cost(shape, device)
        if ratio == 1.0 and method != "exact":
            if method == "lgm" and not rectangular:
                factor = products(3 * SQUARE_STEPS * cube, "fp32", 8 * entries, 37)
            return factor + products(2 * cube, precision.value, 14 * entries, 8)
        if method == "oneshot":
            words = 10 * entries + 10 * short**2
            return factor + products(4 * ratio * cube, precision.value, words, operators=12)
        if method == "published":
            count = dual_ascent_products(ratio, PUBLISHED_STEPS, 0)
            words = PUBLISHED_STEPS * (5 * entries + 10 * short**2)
            beside = products(count * cube, "fp32", words, 8 * PUBLISHED_STEPS)
            return factor.times(PUBLISHED_STEPS) + beside
        if method == "exact":  # on the host, which no speed describes
            return Cost()
        if rectangular:
            exact = lgm.rectangular_exact_products(ratio)
            rough = lgm.rectangular_products(ratio, refine) - exact
            words = (42 + 3 * refine) * entries + (198 + 172 * refine) * short**2
            beside = products(exact * cube, precision.value, words, 221 + 105 * refine)
            beside += products(rough * cube, "bf16" if precision is Precision.BF16X3 else "fp32")
            return factor.times(2 + refine) + beside
        arithmetic = (self.ladder.precision or Precision.FP32).value
        words = 20 * entries + (438 + 268 * refine) * short**2
        count = lgm.gram_products(ratio, refine)
        return products(count * cube, arithmetic, words, 423 + 187 * refine)

    def inspect(self, grad: Tensor, weight: Tensor, direction: Tensor) -> dict[str, Tensor]:
        """Certified gap, tangency defect and spectral norm of a direction."""
        u = self.manifold.unit(weight)
        unit = orient(direction) / self.norm.factor(grad.shape)
        found = certify(u, orient(grad), unit)
        return {"gap": found.gap, "tangency": found.tangency, "norm": found.norm}


def _exact(u: Tensor, grad: Tensor) -> Tensor:
    """The certified optimum, one matrix after the other on the CPU."""
    pairs = zip(u.flatten(0, -3).cpu(), grad.flatten(0, -3).cpu(), strict=True)
    found = torch.stack([certified_optimum(*pair).direction for pair in pairs])
    return found.view(grad.shape).to(grad)
