"""Problems of Manifold Muon, random and recorded, and how good a direction is for one of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from geon.errors import UsageError
from geon.optim import Spectral, Stiefel, polar_svd
from geon.optim.linalg import orient, sym, unit_frobenius
from geon.optim.manifolds.stiefel import tangent_unit
from geon.optim.solvers import Solution
from geon.optim.solvers.exact import Certified, certified_optimum

STIEFEL = Stiefel()
GAP = 1e-5
"""Relative width of the bracket of an optimum that rho trusts."""
LARGE = 512
"""Short side from which an eigendecomposition takes the better part of a second."""


@dataclass(frozen=True)
class Problem:
    """A weight, as stored on `Stiefel()`, and a momentum of any scale, both (d_out, d_in)."""

    case: str
    seed: int
    weight: Tensor
    grad: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def family(self) -> str:
        """Problems of one name are summed up in one table."""
        kind = self.case.split("/")[0]
        d_out, d_in = self.shape
        return f"{kind} {d_out}x{d_in} (r = {max(self.shape) / min(self.shape):g})"

    def to(self, device: str) -> "Problem":
        """Copy to a device."""
        return replace(self, weight=self.weight.to(device), grad=self.grad.to(device))


def _orthonormal(rows: int, columns: int, generator: Generator) -> Tensor:
    return Spectral(scale="none").init((rows, columns), generator)


def _spectrum(of: Callable[[Tensor], Tensor]) -> Callable[[int, int, Generator], Tensor]:
    def make(long: int, short: int, generator: Generator) -> Tensor:
        values = of(torch.arange(short) / short)
        left, right = (_orthonormal(rows, short, generator) for rows in (long, short))
        return (left * values) @ right

    return make


def _low_rank(long: int, short: int, generator: Generator) -> Tensor:
    rank = max(1, short // 8)
    left = torch.randn(long, rank, generator=generator)
    return left @ torch.randn(rank, short, generator=generator)


CASES: Mapping[str, Callable[[int, int, Generator], Tensor]] = {
    "gauss": lambda long, short, generator: torch.randn(long, short, generator=generator),
    "spike": _spectrum(lambda t: 60 * torch.exp(-40 * t) + 0.2 + 1.6 * (1 - t)),
    "decay": _spectrum(lambda t: 10.0 ** (-4 * t)),
    "rank": _low_rank,
}
"""Momenta by their spectrum, (long, short): spike is the shape of a language model's."""


def random_problems(
    cases: Iterable[str], shapes: Iterable[tuple[int, int]], seeds: int
) -> Iterator[Problem]:
    """Every case at every shape, at points drawn uniformly."""
    for shape in shapes:
        for case in cases:
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                # QR leaves the manifold by its rounding; one cubic step brings it back.
                weight = STIEFEL.retract(Spectral().init(shape, generator))
                grad = CASES[case](max(shape), min(shape), generator)
                grad = grad.mT if shape[0] < shape[1] else grad
                yield Problem(case, seed, weight, grad.contiguous())


def load_pairs(path: Path) -> Iterator[Problem]:
    """Recorded problems: a torch file {name: [(step, weight, momentum), ...]}.

    Weights may have any scale, but must be on a Stiefel manifold.

    Raises:
        UsageError: no such file, or not of this form.
    """
    form = "{name: [(step, weight, momentum), ...]}"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        pairs = [(name, *item) for name, items in found.items() for item in items]
        rows = [(name, int(s), w.float(), g.float()) for name, s, w, g in pairs]
    except OSError as error:
        raise UsageError(f"--pairs '{path}': {error.strerror or error}") from None
    except Exception as error:  # unpickling raises anything, in many lines
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"--pairs '{path}' is no torch file of {form}: {said}") from None
    for name, step, weight, grad in rows:
        where = f"--pairs '{path}', {name} at step {step}"
        if weight.dim() != 2 or weight.shape != grad.shape:
            shapes = f"{tuple(weight.shape)} and {tuple(grad.shape)}"
            raise UsageError(f"{where}: weight and momentum must be matrices alike, got {shapes}")
        weight = unit_frobenius(weight) * STIEFEL.length(weight.shape)
        if not float(residual := STIEFEL.residual(weight)) < 1e-3:
            raise UsageError(f"{where}: W^T W is off a multiple of I by {float(residual):.1e}")
        yield Problem(f"pairs/{name}/{step}", 0, weight, grad)


@dataclass(frozen=True)
class Reference:
    """What a direction is measured against: the point in fp64, and the optimum (or None)."""

    u: Tensor
    optimum: Certified | None


def reference(problem: Problem, rho: bool = True) -> Reference:
    """Solve a problem in fp64 on the CPU; without rho only the point is kept."""
    u, g = STIEFEL.unit(problem.weight).cpu(), orient(problem.grad).cpu()
    if not rho:
        return Reference(u.double(), None)
    u = polar_svd(u.double())
    # Large ones get a wider bracket: rho is then a lower bound, and the print says so.
    most = 600 if u.shape[-1] < LARGE else 40
    return Reference(u, certified_optimum(u, g, tol=GAP / 10, max_iterations=most))


def quality(solution: Solution, problem: Problem, known: Reference) -> dict[str, Any]:
    """Judge one direction in fp64, on the CPU."""
    a = orient(solution.direction).cpu().double() / Spectral().factor(problem.shape)
    a = a.nan_to_num(0.0, 0.0, 0.0)  # a direction that is no number descends by nothing
    defect = 2.0 * sym(STIEFEL.unit(problem.weight).cpu().double().mT @ a)
    row = {
        "rho": None,
        "tangency": float(defect.norm()) / math.sqrt(a.shape[-1]),
        "spectral_norm": _norm(a),
        "fallbacks": 0 if solution.fell_back is None else int(solution.fell_back.sum()),
        "gap": None,
    }
    if known.optimum is None:
        return row
    tangent = tangent_unit(known.u, a)
    attained = float((orient(problem.grad).cpu().double() * tangent).sum())
    attained /= max(1.0, _norm(tangent))
    dual = known.optimum.dual
    return row | {"rho": attained / dual if dual else None, "gap": known.optimum.gap}


def _norm(a: Tensor) -> float:
    """Spectral norm by the Gram, several times faster than an SVD."""
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(a.mT @ a)[-1])))
