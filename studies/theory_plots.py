r"""Draw the pictures of docs/theory.md.

python -m geon.studies.theory_plots --pairs muon=runs/muon/pairs.pt hybrid=runs/hybrid/pairs.pt \
    --solver docs/results/solver_pairs.json --out docs
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from geon.benches import results
from geon.launch.leave import guard

Pairs = dict[str, list[tuple[int, Tensor, Tensor]]]
COLOURS = ("#2563eb", "#d97706", "#059669", "#7c3aed")


def spectra(pairs: Pairs, step: int, what: int) -> list[Tensor]:
    """Singular values, largest first, of the weights (what=1) or momenta (what=2) of a step."""
    found = []
    for rows in pairs.values():
        for row in rows:
            if row[0] == step:
                matrix = row[what].float()
                found.append(torch.linalg.svdvals(matrix) * _unit(matrix, what))
    return found


def _unit(matrix: Tensor, what: int) -> float:
    """Weights in RMS to RMS units, momenta in units of their root mean square singular value."""
    if what == 1:
        return (matrix.shape[1] / matrix.shape[0]) ** 0.5
    return float(min(matrix.shape) ** 0.5 / matrix.norm().clamp_min(1e-30))


def _curve(axes: Axes, values: list[Tensor], colour: str, label: str, dashed: bool) -> None:
    """Median over the matrices, and a band from the 10th to the 90th percentile."""
    length = min(len(v) for v in values)
    stacked = torch.stack([v[:length] for v in values])
    x = torch.linspace(0, 1, length)
    low, middle, high = torch.quantile(stacked, torch.tensor([0.1, 0.5, 0.9]), dim=0)
    axes.plot(x, middle, color=colour, lw=1.4, ls="--" if dashed else "-", label=label)
    if not dashed:
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def draw_spectra(runs: dict[str, Pairs], path: Path) -> None:
    """Weights before and after, and what the directions are taken of."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, pairs), colour in zip(runs.items(), COLOURS, strict=False):
        steps = sorted({row[0] for rows in pairs.values() for row in rows})
        first, last = steps[0], steps[-1]
        _curve(left, spectra(pairs, first, 1), colour, f"{name}, step {first}", dashed=True)
        _curve(left, spectra(pairs, last, 1), colour, f"{name}, step {last}", dashed=False)
        _curve(right, spectra(pairs, last, 2), colour, f"{name}, step {last}", dashed=False)
    left.set_ylabel("singular value, RMS to RMS")
    left.set_title("hidden weights", fontsize=10)
    right.set_yscale("log")
    right.set_ylabel("singular value over their rms")
    right.set_title("averaged gradients", fontsize=10)
    _finish(figure, [left, right], "rank, as a share", path)


def draw_solvers(content: dict[str, Any], path: Path) -> None:
    """Descent against cost on the recorded matrices that are 4 to 1."""
    costs = {
        (row["solver"], *sorted((row["d_out"], row["d_in"]))): row["n3"]
        for row in results.rows_of(content["costs"])
    }
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in results.rows_of(content["quality"]):
        if row["case"] != "pairs" or row["long"] != 4 * row["short"]:
            continue
        cost = costs[row["solver"], row["short"], row["long"]]
        low, middle, high = (
            max(1 - row[key], 1e-6) for key in ("rho_max", "rho_median", "rho_min")
        )
        axes.plot([cost] * 2, [low, high], lw=1)
        axes.plot(cost, middle, "o", color=axes.lines[-1].get_color(), label=row["solver"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("shortfall from the certified optimum")
    _finish(figure, [axes], "products of n x n, retraction included", path)


def _finish(figure: Figure, panels: list[Axes], xlabel: str, path: Path) -> None:
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    print(path)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/theory.md.")
    parser.add_argument("--pairs", nargs="*", default=[], metavar="LABEL=FILE")
    parser.add_argument("--solver", type=Path, help="output of benches.solver --json")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args(arguments)
    runs = {}
    for item in args.pairs:
        label, _, file = item.partition("=")
        if not Path(file).is_file():
            print(f"geon: error: --pairs '{item}': give LABEL=FILE of a recording", file=sys.stderr)
            return 2
        runs[label] = torch.load(file, weights_only=True)
    if runs:
        draw_spectra(runs, args.out / "theory_spectra.png")
    if args.solver:
        draw_solvers(json.loads(args.solver.read_text()), args.out / "theory_solvers.png")
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
