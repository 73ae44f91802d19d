"""The gallery of optimizers: the table of docs/optimizers.md, and its two pictures.

python -m geon.studies.gallery           # print the table
python -m geon.studies.gallery --draw    # also draw gallery_paths.png and gallery_spectra.png

Every recipe of configs/optim has a row. State, share of the step, place and loss come from
docs/results/leaderboard.json; norm and manifold from the recipe itself.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from geon.configs.recipes import read
from geon.configs.schema import RuleKind
from geon.engine.main import prepare
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import guard
from geon.optim import build
from geon.studies import shared as studies

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "optim"


class Entry(NamedTuple):
    """What no result file knows: how an optimizer steps a hidden matrix, and where it is from."""

    mechanism: str
    source: str


def _arxiv(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


# In the order of the table: vectors, entries, curvature, then matrices.
GALLERY = {
    "sgd": Entry("the gradient", "Robbins, Monro 1951"),
    "momentum": Entry("running sum of gradients", "Polyak 1964"),
    "nesterov": Entry("the same, looking one step ahead", "Nesterov 1983"),
    "nsgd": Entry("momentum over its length", _arxiv("2002.03305")),
    "lars": Entry("a step in proportion to the weight's length", _arxiv("1708.03888")),
    "hyperspherical": Entry(
        "momentum tangent to a sphere over its length, along it",
        "[J. Su](https://kexue.fm/archives/11196)",
    ),
    "signsgd": Entry("sign of the momentum", _arxiv("1802.04434")),
    "lion": Entry("sign of a mixture of momentum and gradient", _arxiv("2302.06675")),
    "adagrad": Entry("entries over the root of their summed squares", "Duchi, Hazan, Singer 2011"),
    "rmsprop": Entry("entries over the root of their mean squares", "Tieleman, Hinton 2012"),
    "adam": Entry("momentum over the root of mean squares", _arxiv("1412.6980")),
    "adamw": Entry("Adam, weights decayed apart", _arxiv("1711.05101")),
    "adafactor": Entry("mean squares kept as rows times columns", _arxiv("1804.04235")),
    "lamb": Entry("AdamW in proportion to the weight's length", _arxiv("1904.00962")),
    "sophia": Entry("momentum over the Hessian's diagonal, cut", _arxiv("2305.14342")),
    "shampoo": Entry("roots of row and column second moments, both sides", _arxiv("1802.09568")),
    "soap": Entry("Adam in the eigenbasis of Shampoo", _arxiv("2409.11321")),
    "uscion": Entry("orthogonalized momentum, a norm for each role", _arxiv("2502.07529")),
    "scion": Entry("the same inside a ball: a Frank-Wolfe step", _arxiv("2502.07529")),
    "muon": Entry(
        "orthogonalized momentum", "[K. Jordan](https://kellerjordan.github.io/posts/muon/)"
    ),
    "normuon": Entry("Muon, rows over their running mean square", _arxiv("2510.05491")),
    "muonh": Entry("Muon at constant Frobenius norm", _arxiv("2606.16899")),
    "spectral_sphere": Entry("Muon at constant spectral norm", _arxiv("2601.08393")),
    "manifold_muon": Entry(
        "Muon tangent to the matrices of orthogonal columns",
        "[J. Bernstein](https://thinkingmachines.ai/blog/modular-manifolds/)",
    ),
    "hybrid_stiefel": Entry("the same, Scion's norms at the ends", "this repository"),
    "hybrid_tokens": Entry("as the hybrid, for large vocabularies", "this repository"),
    "hybrid": Entry("heads of q, k on DGram, the rest in a spectral ball", "this repository"),
}

BESIDE = ("adamw_rates", "hybrid_half_tokens")
"""Arms of the leaderboard that are no recipe of their own."""


def table(board: Mapping[str, Any], recipes: Path = RECIPES) -> str:
    """The gallery as markdown, a row for each recipe.

    board: content of leaderboard.json.
    """
    ranked = [name for name in board if name not in ("meta", *BESIDE)]
    ranked.sort(key=lambda name: board[name]["loss"])
    heads = ["`optim=`", "a hidden matrix moves by", "norm x manifold", "state, B/param"]
    heads += ["of step time", "place", "loss, nats/byte", "source"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, entry in GALLERY.items():
        measured = ["", "", "", ""]
        if name in ranked:
            found = board[name]
            measured = [
                f"{found['state_bytes_per_param']:.2f}",
                f"{found['step_share']:.0%}",
                str(ranked.index(name) + 1),
                f"{fmean(found['losses']):.3f} ± {found['sem']:.3f}",
            ]
        link = f"[{name}](../configs/optim/{name}.yaml)"
        cells = [link, entry.mechanism, pair(name, recipes), *measured, entry.source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pair(name: str, recipes: Path = RECIPES) -> str:
    """Norm x manifold of a recipe's hidden matrices; empty where its rule is none."""
    hidden = yaml.safe_load((recipes / f"{name}.yaml").read_text())["hidden"]
    if hidden.get("rule", RuleKind.steepest.value) != RuleKind.steepest.value:
        return ""
    whole = read(name).hidden
    return f"{whole.norm} x {whole.manifold}"


class Valley(nn.Module):
    """f(W) = 1/2 tr(W' P W Q): a valley over 2 x 2 matrices whose minimum is 0.

    P = U diag(10, 1) U' and Q = V diag(10, 1) V' with U and V turned by 35 and 20 degrees, so the
    curvatures are 100, 10, 10 and 1 along u_i v_j', none of them along an entry.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _turned(35.0), _turned(20.0)
        start = self.left @ torch.diag(torch.tensor([0.5, 1.0])) @ self.right.T
        self.weight = nn.Parameter(start)

    def forward(self) -> Tensor:
        """The height."""
        return 0.5 * (self.scales * self.turned().square()).sum()

    @property
    def scales(self) -> Tensor:
        """Curvature of each coordinate of `turned`."""
        sides = torch.tensor([10.0, 1.0])
        return torch.outer(sides, sides)

    def turned(self) -> Tensor:
        """Coordinates of W in the basis u_i v_j'."""
        return self.left.T @ self.weight @ self.right


def _turned(degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )


STEPS = 60
RATES = tuple(2.0**k for k in range(-10, 3))
WALKERS = ("sgd", "momentum", "signsgd", "lion", "adamw", "soap", "nsgd", "muon")


def walk(recipe: str, lr: float) -> tuple[Tensor, float]:
    """Way through the valley at a rate that falls to 0: (steps + 1, 2, 2), and the last height."""
    valley = Valley()
    settings = {"hidden.weight_decay": 0.0} if recipe in ("muon", "adamw") else {}
    optimizer = build(
        valley, recipe, lr, overrides={"weight": "hidden"}, settings=settings, verbose=False
    )
    way = [valley.turned().detach()]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / STEPS)
        optimizer.zero_grad()
        valley().backward()
        try:
            optimizer.step()
        except FloatingPointError:  # this rate diverges
            return torch.stack(way), math.inf
        way.append(valley.turned().detach())
    return torch.stack(way), valley().item()


def best_walk(recipe: str) -> tuple[float, Tensor, float]:
    """Rate of the lowest end, its way, and the end's height."""
    ways = {lr: walk(recipe, lr) for lr in RATES}
    lr = min(ways, key=lambda one: ways[one][1])
    return lr, *ways[lr]


def draw_paths(path: Path) -> dict[str, tuple[float, float]]:
    """Paths of some recipes, each at its best rate; returns rate and end height of each."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True).flat
    flat = torch.linspace(-0.5, 1.2, 80)
    steep = torch.linspace(-0.55, 0.55, 80)
    height = 0.5 * (100 * steep[:, None].square() + flat[None, :].square())
    ends = {}
    for axes, recipe in zip(panels, WALKERS, strict=True):
        lr, way, end = best_walk(recipe)
        ends[recipe] = lr, end
        levels = [0.02, 0.1, 0.5, 2.0, 8.0]
        axes.contour(flat, steep, height, levels, colors="#d1d5db", linewidths=0.8)
        axes.plot(way[:, 1, 1], way[:, 0, 0], ".-", color=studies.COLOURS[0], lw=1, ms=3)
        axes.plot(0, 0, "+", color=studies.COLOURS[3])
        axes.set_title(f"{recipe}, lr {lr:g}: ends at {end:.1e}", fontsize=9)
        axes.set_xlim(-0.5, 1.2)
        axes.set_ylim(-0.55, 0.55)
    figure.supxlabel("along u2 v2', curvature 1", fontsize=9)
    figure.supylabel("along u1 v1', curvature 100", fontsize=9)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")
    return ends


ENTRYWISE = ("sgd", "momentum", "signsgd", "lion", "adamw", "adafactor")
MATRIXWISE = ("muon", "normuon", "hybrid", "manifold_muon", "scion", "shampoo", "soap")
MATRIX = "blocks.1.up.weight"
UPDATES = 40


def last_update(recipe: str, lr: float, steps: int = UPDATES) -> Tensor:
    """What the last of some steps adds to a hidden matrix of a small GPT on real text."""
    sizes = "model.n_layer=2 model.d_model=64 model.head_dim=16 model.context=128"
    rest = "data.batch_tokens=2048 parallel=single device=cpu checkpoint=none schedule=constant"
    told = [f"optim={recipe}", f"optim.lr={lr}", f"schedule.steps={steps}"]
    trainer, _ = prepare(compose([*told, *sizes.split(), *rest.split()]), Env(), [])
    try:
        for _ in range(steps):
            before = trainer.run.whole(MATRIX).clone()
            trainer.train_step()
        return trainer.run.whole(MATRIX) - before
    finally:
        trainer.loader.close()


def draw_spectra(board: Mapping[str, Any], path: Path, steps: int = UPDATES) -> None:
    """Singular values of the last update, over their root mean square."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, names in zip(panels, (ENTRYWISE, MATRIXWISE), strict=True):
        for colour, name in zip(studies.COLOURS, names, strict=False):
            values = torch.linalg.svdvals(last_update(name, board[name]["lr"], steps))
            ranks = range(1, len(values) + 1)
            axes.plot(ranks, values / values.square().mean().sqrt(), color=colour, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("rank")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("singular value over their rms")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def run(arguments: Sequence[str]) -> int:
    """Print the table; draw where asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.studies.gallery", description="Table and pictures of the optimizers."
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="holds results/, pictures")
    parser.add_argument("--draw", action="store_true", help="draw the pictures, about a minute")
    told = parser.parse_args(arguments)
    board = studies.load(told.out, "leaderboard")
    print(table(board))
    if told.draw:
        draw_paths(told.out / "gallery_paths.png")
        draw_spectra(board, told.out / "gallery_spectra.png")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
