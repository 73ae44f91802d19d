"""Bad numbers of a step: what is looked at, how they are told, and gradients that are cut down.

What runs at every step is in `geon.optim.step`; here is what it needs when something is found.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import ExchangeError, UsageError
from geon.optim.shard import Ranks

NONFINITE = ("raise", "skip", "ignore")
"""What a gradient with nan or infinity does; see `HybridOptimizer`."""

ENTRY_LIMIT = 1e18
"""Largest norm of a gradient whose square is averaged in fp32, which ends at 3.4e38."""
LIMIT = 1e38
"""Largest norm of a gradient that is averaged in fp32: a difference of two stays in range."""

KINDS = ("update", "loss", "gradient")
"""What may be bad: the one that comes first is told. An update is that of the step before."""


class BadNumber(FloatingPointError):
    """A loss, gradient, weight or state that is not finite; raised on every rank.

    Attributes:
        kind: one of KINDS.
        late: whether the step before made it, so that weights or state hold it.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.late = kind == "update"


@dataclass
class Watch:
    """What a step looks at besides the finiteness of its gradients.

    Attributes:
        updates: look whether weights and state are finite after each step. It is asked for with
            the gradients of the next step, or by `HybridOptimizer.settle`, so nothing waits for it.
        spike: a gradient whose norm is above so many times its parameter's running norm is cut
            down to the running norm; 0 never. What enters the running norm is at most `spike`
            times it, so one spike moves it little, and gradients that stay large are followed.
        warm: gradients of a parameter that are seen before one is held against the others.
        memory: gradients that the running norm averages over; `warm` or more.
        loss: of this step, on the device: set it before a step to have it looked at; one use.
        norms: running norm by parameter: how many gradients it is of, and the norm.
        cut: gradients that were cut down.
    """

    updates: bool = False
    spike: float = 0.0
    warm: int = 20
    memory: int = 50
    loss: Tensor | None = None
    norms: dict[str, tuple[int, float]] = field(default_factory=dict)
    cut: int = 0
    pending: Tensor | None = None
    """Sum of the norms of `held` after the last step, on the device; not read yet."""
    held: Sequence[tuple[str, str, Tensor]] = ()
    """Weights and states of the last step: parameter, "weight" or key, this rank's piece."""

    def __getstate__(self) -> dict[str, Any]:
        """What copies take along: all but what waits to be read."""
        return {**self.__dict__, "loss": None, "pending": None, "held": ()}

    def facts(self) -> dict[str, Any]:
        """History as JSON, for a checkpoint."""
        return {"norms": {name: list(one) for name, one in self.norms.items()}, "cut": self.cut}

    def load(self, facts: Mapping[str, Any]) -> None:
        """Take the history that `facts` gave, or none; what is pending is forgotten."""
        norms = facts.get("norms", {})
        self.norms = {name: (int(count), float(norm)) for name, (count, norm) in norms.items()}
        self.cut, self.pending, self.loss = int(facts.get("cut", 0)), None, None


def check_begun(begun: bool) -> bool:
    """Refuse a first step without any gradient among several ranks; gives `begun` back.

    Raises:
        UsageError: says what replaces parameters.
    """
    if not begun and dist.is_available() and dist.is_initialized():
        raise UsageError(
            "no parameter of the optimizer has a gradient in its first step: fully_shard, "
            "parallelize_module and their like replace a model's parameters; make the optimizer "
            "after them, or put the new parameters into its param_groups"
        )
    return begun


def check_policies(
    nonfinite: str, max_norm: float, mesh: Any, placement: Any, watch: Watch
) -> None:
    """Refuse words and numbers that a step could not follow.

    Raises:
        UsageError: names the value.
    """
    if nonfinite not in NONFINITE:
        raise UsageError(f"nonfinite '{nonfinite}' is not one of {', '.join(NONFINITE)}")
    if not 0.0 <= max_norm < math.inf:
        raise UsageError(f"max_norm {max_norm} must be finite and 0 or more")
    if watch.spike and not 2.0 <= watch.spike < math.inf:
        raise UsageError(f"spike {watch.spike} must be 0, or a factor of 2 or more")
    if watch.spike and nonfinite == "ignore":
        raise UsageError(
            f"spike {watch.spike} with nonfinite='ignore': norms of gradients are not looked at; "
            "set spike=0 (health.spike), or nonfinite='raise' (optim.nonfinite)"
        )
    if mesh is not None and placement is not None:
        raise UsageError("mesh and placement both say which ranks step together: give one of them")


def examined(
    named: Sequence[tuple[str, Tensor]],
    norms: Sequence[float],
    told: Mapping[str, float],
    squared: Set[str],
    watch: Watch,
) -> tuple[list[float], dict[str, str]]:
    """Look again at numbers of which one is large or not finite: norms of finite entries overflow.

    named, norms: gradients, and their norms in fp32.
    told: the loss, and the sum of norms of weights and state, by kind.
    squared: parameters whose gradients are squared as they are, in fp32.
    watch: where it cuts spikes down, large gradients are left to it.

    Returns: norms, in fp64 where fp32 could not hold them, 0 for bad ones; where what is bad, by
        kind.
    """
    found, wrong, where = list[float](), list[str](), dict[str, str]()
    for (name, grad), norm in zip(named, norms, strict=True):
        if not math.isfinite(norm):
            norm = float(grad.double().norm())
        limit = ENTRY_LIMIT if name in squared else LIMIT
        if not math.isfinite(norm) or (norm > limit and not watch.spike):
            wrong.append(f"of '{name}'" + f", of norm {norm:.0e}," * math.isfinite(norm))
            norm = 0.0
        found.append(norm)
    if wrong:
        where["gradient"] = f"{wrong[0]} and {len(wrong) - 1} more"
    if not math.isfinite(told.get("loss", 0.0)):
        where["loss"] = "of this rank"
    if not math.isfinite(told.get("update", 0.0)) and (first := first_bad(watch.held)):
        where["update"] = first
    return found, where


def first_bad(named: Iterable[tuple[str, str, Tensor]]) -> str:
    """Say the first of some tensors, (parameter, what of it, tensor), that is not finite; or ''."""
    for name, what, tensor in named:
        if not bool(tensor.isfinite().all()):
            return f"the {what} of '{name}'"
    return ""


def cut_down(grad: Tensor, factor: float) -> None:
    """Multiply a gradient in place, in fp64: factors of 1e-40 and entries of 1e38 meet here."""
    grad.copy_(grad.double() * factor)


def bad_number(kind: str, where: str) -> BadNumber:
    """The error of a bad number.

    where: what and whose; empty where another rank has found it.
    """
    place = where or "on another rank"
    if kind == "update":
        place = where or "a weight or state on another rank"
        return BadNumber(kind, f"{place} is not finite after the update: lower optim.lr")
    verb = "is not finite" if "of norm" not in where else "is beyond what fp32 averages hold"
    return BadNumber(
        kind,
        f"{'the loss' if kind == 'loss' else 'a gradient'} {place} {verb}: nothing was stepped, "
        "weights and state are as they were. Lower optim.lr, or leave out such steps: "
        "health.policy=skip, or HybridOptimizer(nonfinite='skip')",
    )


def reduced(number: Tensor, operation: str, ranks: Ranks) -> Tensor:
    """A number over all ranks, in place.

    Raises:
        ExchangeError: another rank is gone.
    """
    try:
        dist.all_reduce(number, getattr(dist.ReduceOp, operation), ranks.group)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {ranks.rank}: the reduction of gradient norms (all_reduce) failed: another rank "
            f"ended, or took longer than parallel.timeout_seconds. {str(error).splitlines()[0]}"
        ) from error
    return number


def clip(
    pairs: Sequence[tuple[str, Tensor]], max_norm: float, copies: Mapping[str, int], ranks: Ranks
) -> Tensor:
    """Clip gradients to a global 2-norm in place; return the norm before.

    Exact whatever meshes the parameters lie on: each square is divided by the number of ranks that
    hold a copy, and one sum goes over all ranks.
    """
    squares = [grad.float().square().sum() / copies[name] for name, grad in pairs]
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=ranks.device)
    norm = (total if ranks.group is None else reduced(total, "SUM", ranks)).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in pairs:
        grad.mul_(scale)
    return norm


def spikes(watch: Watch, squares: Mapping[str, float]) -> dict[str, float]:
    """Factors on gradients that are spikes; the running norms are brought up to date.

    squares: of norms over all ranks, by parameter.
    """
    cut, now = dict[str, float](), dict[str, tuple[int, float]]()
    for name, square in squares.items():
        if square > 0.0:
            norm = math.sqrt(square)
            count, mean = watch.norms.get(name, (0, norm))
            if norm > watch.spike * mean:
                if count >= watch.warm:
                    cut[name] = mean / norm
                norm = watch.spike * mean
            now[name] = (min(count + 1, watch.memory), (count * mean + norm) / (count + 1))
    watch.norms |= now
    watch.cut += len(cut)
    return cut
