"""Solvers of Manifold Muon as they are compared: what a step of each costs, beside Muon."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from geon.benches.problems import STIEFEL, Problem
from geon.errors import UsageError, nearest
from geon.optim import Ladder, Polar, Precision, Rule, Spectral
from geon.optim.linalg import ieee_products, orient, orient_like, unit_frobenius
from geon.optim.solvers import Solution
from geon.optim.solvers.published import dual_ascent

ANGLE = 0.02
"""Of the retraction that is timed: one cubic step."""
_ATEN = torch.ops.aten
MULTIPLIES = (_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm)
ENOUGH = 0.3
"""Seconds in all before a median is taken: fast steps are repeated more often."""
LM_SCALE = 1e-3
"""Root mean square singular value of a language model's momentum: the published solver's input."""


@dataclass(frozen=True)
class Contestant:
    """A solver that can be timed: its direction, and the move that follows."""

    name: str
    form: str
    dtype: str
    solve: Callable[[Tensor, Tensor], Solution]
    move: Callable[[Tensor, Tensor, float], Tensor]

    @property
    def label(self) -> str:
        """Name, form and dtype."""
        return label(self.name, self.form, self.dtype)

    def step(self, grad: Tensor, weight: Tensor) -> Solution:
        """One whole step; the new weight is dropped."""
        with ieee_products():
            solution = self.solve(grad, weight)
            self.move(weight, solution.direction, ANGLE)
        return solution


def _ruled(name: str, form: str, dtype: str, rule: Rule) -> Contestant:
    def solve(grad: Tensor, weight: Tensor) -> Solution:
        return rule.solve(grad, weight if rule.needs_weight else None)

    return Contestant(name, form, dtype, solve, rule.move)


def rung(dtype: str, steps: int = 6, form: str = "-", told: str = "", **ladder: Any) -> Contestant:
    """One rung of the ladder, its polar factors in this dtype; `told` names it in tables."""
    chosen = Ladder(form="auto" if form == "-" else form, **ladder)
    rule = Rule(Spectral(polar=Polar(steps=steps, precision=Precision(dtype))), STIEFEL,
                ladder=chosen)  # fmt: skip
    name = f"{chosen.method}({chosen.refine})" if chosen.refine else chosen.method
    return _ruled(name, form, told or dtype, rule)


def muon(dtype: str) -> Contestant:
    """Five quintic steps on the momentum itself: no tangent work, no retraction."""
    polar = Polar("keller", 5, Precision(dtype))
    return _ruled("muon", "-", dtype, Rule(Spectral(polar=polar)))


def contestants() -> list[Contestant]:
    """Everything that is compared by default."""
    x3 = Precision.BF16X3
    return [
        rung("fp32", method="oneshot"),
        rung("bf16", method="oneshot"),
        rung("fp32", form="gram"),
        rung("bf16x3", form="gram", precision=x3),
        rung("fp32", form="rect"),
        rung("bf16", form="rect"),
        rung("bf16", form="rect", told="bf16+x3", precision=x3),
        rung("fp32", form="gram", refine=1),
        rung("fp32", steps=10, method="published"),
        muon("fp32"),
        muon("bf16"),
    ]


def published_own(grad: Tensor, weight: Tensor) -> Solution:
    """The published solver at its own settings and a language model's scale; squares included."""
    scale = LM_SCALE * math.sqrt(min(grad.shape[-2:]))
    polar = Polar(steps=10, precision=Precision.BF16)
    g = orient(unit_frobenius(grad)) * scale
    a = dual_ascent(STIEFEL.unit(weight), g, 100, 0.01, normalise=False, polar=polar)
    return Solution(orient_like(a, grad) * Spectral().factor(grad.shape))


def own_settings(device: str) -> list[Contestant]:
    """The published solver at its own settings, and lgm as it runs on this device."""
    rough = device != "cpu"
    ours = rung("bf16" if rough else "fp32", form="rect" if rough else "gram")
    return [
        Contestant("published(own)", "-", "bf16", published_own, Rule(Spectral(), STIEFEL).move),
        ours,
    ]


def choose(words: str) -> list[Contestant]:
    """Contestants whose name or label (spaces as dashes) is among the comma-separated words.

    Raises:
        UsageError: a word that chooses none.
    """
    found = contestants()
    if not words:
        return found
    keys = [{_plain(c.name), _plain(c.label)} for c in found]
    wanted = [_plain(word) for word in words.split(",")]
    for word in wanted:
        known = sorted(set().union(*keys))
        if word not in known:
            raise UsageError(
                f"--solvers '{word}' is not one of {', '.join(known)}.{nearest(word, known)}"
            )
    return [c for c, own in zip(found, keys, strict=True) if own & set(wanted)]


def label(*parts: str) -> str:
    """Join name, form and dtype."""
    return " ".join(part for part in parts if part != "-")


def _plain(label: str) -> str:
    """As typed in a shell: lgm1-gram-fp32."""
    return label.strip().replace("(", "").replace(")", "").replace(" ", "-")


def _cholesky_flops(shape: torch.Size, *_: Any, **__: Any) -> float:
    return math.prod(shape) * shape[-1] / 3


def _product_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> float:
    # torch's own count refuses the overload with an out_dtype, of bf16x3 on a GPU.
    return 2.0 * math.prod(a) * b[-1]


def _symmetric(x: Tensor) -> bool:
    return bool((x - x.mT).norm() <= 0.01 * x.norm())


class SymmetricProducts(TorchDispatchMode):
    """FLOPs that kernels would save by computing one triangle of symmetric products.

    A product counts as symmetric when its result is, within 1%: X^T X, and products of commuting
    symmetric factors such as Gram @ Gram, in every iteration and in Muon alike. Skew results, and
    the two crossed passes of a bf16x3 product (symmetric only as a sum), count in full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.saved = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator; look at the result of a product."""
        out = func(*args, **(kwargs or {}))
        multiplies = func.overloadpacket in MULTIPLIES
        if multiplies and out.shape[-1] == out.shape[-2] and _symmetric(out):
            last = [x for x in args if isinstance(x, Tensor)][-1]
            self.saved += out.numel() * last.shape[-2]
        return out


def products(contestant: Contestant, grad: Tensor, weight: Tensor) -> tuple[float, float]:
    """Products of n x n in a step of the real code, and with symmetric ones counted half.

    A Cholesky factor counts 1/6; matrix-vector products of power iterations count their 1/n.
    """
    own = {_ATEN.linalg_cholesky_ex: _cholesky_flops}
    own |= dict.fromkeys((_ATEN.mm, _ATEN.bmm), _product_flops)
    with FlopCounterMode(display=False, custom_mapping=own) as full, SymmetricProducts() as half:
        contestant.step(grad, weight)
    cube = 2.0 * min(grad.shape[-2:]) ** 3 * math.prod(grad.shape[:-2])
    return full.get_total_flops() / cube, (full.get_total_flops() - half.saved) / cube


def costs(
    chosen: Sequence[Contestant], problem: Problem, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Products and seconds of each contestant at one shape: they do not depend on the numbers.

    Contestants are timed in turn, each with Muon in its own dtype, so that noise hits all. Seconds
    are medians of `repeats` at least, of a whole batch; over_muon is the median of the ratios.
    """
    grad, weight = (x.repeat(batch, 1, 1) for x in (problem.grad, problem.weight))
    rivals = {c.dtype: muon(c.dtype.partition("+")[0]) for c in chosen}
    beside = {dtype: products(rival, grad, weight) for dtype, rival in rivals.items()}
    counted = [products(c, grad, weight) for c in chosen]  # and warms up
    times: list[list[tuple[float, float]]] = [[] for _ in chosen]
    turn = 1
    while waiting := [
        (c, own)
        for c, own in zip(chosen, times, strict=True)
        if len(own) < repeats or sum(t for t, _ in own) < ENOUGH
    ]:
        for c, own in waiting:
            # The second of a pair finds the caches warm: take turns at it.
            pair = [seconds(x, grad, weight) for x in (c, rivals[c.dtype])[::turn]][::turn]
            own.append((pair[0], pair[1]))
        turn = -turn
    return [
        {
            "n3": n3,
            "n3_symmetric_half": half,
            "n3_muon": beside[c.dtype][0],
            "n3_muon_symmetric_half": beside[c.dtype][1],
            "seconds": median(t for t, _ in own),
            "muon_seconds": median(t for _, t in own),
            "over_muon": median(t / other for t, other in own),
            "batch": batch,
        }
        for c, (n3, half), own in zip(chosen, counted, times, strict=True)
    ]


def seconds(contestant: Contestant, grad: Tensor, weight: Tensor) -> float:
    """Of one step, the device waited for."""
    wait = torch.cuda.synchronize if grad.is_cuda else torch.cpu.synchronize
    wait()
    begin = time.perf_counter()
    contestant.step(grad, weight)
    wait()
    return time.perf_counter() - begin
