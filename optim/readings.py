"""What a step says about its own directions, gathered on the device and read by the log."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from geon.optim.rule import Rule
from geon.optim.solvers import Solution


class Readings:
    """Counts fallbacks at every step, and inspects directions when asked to.

    Nothing is read back from the device before `summary`.

    Attributes:
        wanted: set it before a step to have the directions of that step inspected.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._fell_back: Tensor | None = None
        self._looked: dict[str, list[Tensor]] = {}
        self._looking: dict[str, list[Tensor]] = defaultdict(list)

    def take(
        self,
        rule: Rule,
        update: Tensor,
        weight: Tensor,
        solution: Solution,
        which: Sequence[int] | None = None,
    ) -> None:
        """Take note of a batch of solved directions, on a manifold, or of some of its matrices."""
        if which is not None and len(which) < len(update):
            index = torch.tensor(which, device=update.device)
            update, weight = update[index], weight[index]
            fell_back = None if solution.fell_back is None else solution.fell_back[index]
            solution = Solution(solution.direction[index], fell_back)
        if solution.fell_back is not None:
            self.count(solution.fell_back)
        if not self.wanted:
            return
        for name, values in rule.solver.inspect(update, weight, solution.direction).items():
            self._looking[name].append(values.flatten())
        self._looking["residual"].append(rule.manifold.residual(weight).flatten())
        singular = _singular_values(weight)
        self._looking["spectrum"].append(singular.amax(dim=-1).flatten())
        self._looking["spectrum_min"].append(singular.amin(dim=-1).flatten())

    def count(self, fell_back: Tensor) -> None:
        """Count matrices that a cheaper solver stood in for."""
        count = fell_back.sum()
        self._fell_back = count if self._fell_back is None else self._fell_back + count

    def close(self) -> None:
        """End an inspected step: keep its readings, and inspect none of the next."""
        if self.wanted:
            self._looked, self._looking = dict(self._looking), defaultdict(list)
            self.wanted = False

    def fallbacks(self) -> int:
        """Matrices solved by a fallback since the last call; waits for the device."""
        count, self._fell_back = self._fell_back, None
        return 0 if count is None else int(count)

    def values(self) -> dict[str, list[float]]:
        """Each reading of each matrix that this rank looked at in the last inspected step."""
        return {
            name: torch.cat([v.double().cpu() for v in values]).tolist()
            for name, values in self._looked.items()
        }

    def summary(self, others: Sequence[dict[str, list[float]]] = ()) -> dict[str, float]:
        """Worst and median of each reading over the matrices of the last inspected step.

        others: `values` of all ranks, which each look at the matrices they own; own ones if empty.

        Names: gap (shortfall from the certified optimum), tangency, norm (of the direction),
        residual (of the weight), spectrum (singular values of the weight where RMS -> RMS norm 1
        is 1); the largest of each and the median, the smallest where the name says so.
        """
        found: dict[str, float] = {}
        everyone = others or [self.values()]
        for name in dict.fromkeys(name for one in everyone for name in one):
            joined = torch.tensor([v for one in everyone for v in one.get(name, [])]).double()
            if name.endswith("_min"):
                found[name] = float(joined.min())
            else:
                found[f"{name}_max"] = float(joined.max())
                found[f"{name}_median"] = float(joined.median())
        return found


def _singular_values(weight: Tensor) -> Tensor:
    """Singular values over sqrt(d_out/d_in), by the short side's Gram in float64; nan for nan."""
    sound = weight.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    w = torch.where(sound, weight, 0.0).double()  # an eigensolver raises on nan
    gram = w.mT @ w if w.shape[-2] >= w.shape[-1] else w @ w.mT
    squares = torch.linalg.eigvalsh(gram).clamp_min(0.0) * (w.shape[-1] / w.shape[-2])
    return torch.where(sound[..., 0], squares.sqrt(), torch.nan)
