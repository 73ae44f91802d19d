"""Do activations, and their change by an update, keep their size over widths? `make coord-check`.

Trains models of several widths and one head dimension for a few updates at a constant rate, and
fits d log2 RMS / d log2 width of activations on a fixed probe batch, before each update and after
the last, and of their change by each update. Slopes near 0 mean that a rate can be carried over
widths; AdamW in standard parametrisation is the control, and must fail. Writes
results/coord_check.json and coord_check.png. Source: Yang et al., Tensor Programs V,
arXiv 2203.03466, appendix D.1.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from geon.data import Batches, Corpus
from geon.engine.build import (
    initialise,
    make_batches,
    make_corpus,
    make_model,
    make_optimizer,
    make_routing,
)
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.models import LanguageModel
from geon.scripts.flags import whole
from geon.studies import shared as studies

BASE = [
    "model.n_layer=2",
    "model.head_dim=16",
    "model.context=64",
    "data.batch_tokens=256",
    "parallel=single",
]
ARMS = {
    "hybrid": ["optim=hybrid"],
    "scion": ["optim=scion"],
    "uscion": ["optim=uscion"],
    "manifold_muon": ["optim=manifold_muon"],
    "muon": ["optim=muon"],
    "adamw_mup": ["optim=adamw", "optim.lr=0.015625", "model.mup=true", "model.base_width=32"],
    "adamw": ["optim=adamw", "optim.lr=0.015625"],
}
"""AdamW's rate is about its best at the least width, and the control."""
WIDTHS, SEEDS, UPDATES = (32, 64, 128, 256, 512), (0, 1), 10
CHECKED = ("embedding", "attention", "mlp", "residual")
ACTIVATIONS = (*CHECKED, "logits")
MOST, CONTROL = 0.1, 0.5
"""Slope that a pass allows, and that the control must exceed."""


@torch.no_grad()
def activations(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """Activations on a probe batch by name; those of each block, stacked."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ACTIVATIONS}
    blocks = list(model.get_submodule("blocks").children())
    watched = {"embedding": [model.get_submodule("embed")], "residual": blocks}
    watched["attention"] = [block.get_submodule("attention.proj_out") for block in blocks]
    watched["mlp"] = [block.get_submodule("down") for block in blocks]
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
        for name, modules in watched.items()
        for module in modules
    ]
    seen["logits"].append(model(tokens))
    for handle in handles:
        handle.remove()
    return {name: torch.stack(found) for name, found in seen.items()}


def trace(overrides: Sequence[str], updates: int, corpus: Corpus) -> dict[str, list[list[float]]]:
    """RMS of each activation at 0..updates, and of its change by each update."""
    config = compose([*BASE, *overrides])
    model = make_model(config.model)
    routing = make_routing(model, config.optim)
    model.to_empty(device="cpu")
    initialise(model, routing, config.seed)
    optimizer = make_optimizer(model, routing, config)
    batches: Batches = make_batches(config, corpus, 0, 1)
    probe = batches.step(updates + 1)[0][0]
    before = activations(model, probe)
    sizes = {name: [[_rms(x)], []] for name, x in before.items()}
    for step in range(updates):
        for tokens, targets in batches.step(step):
            model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = activations(model, probe)
        for name, x in after.items():
            sizes[name][0].append(_rms(x))
            sizes[name][1].append(_rms(x - before[name]))
        before = after
    return sizes


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """D log2 size / d log2 width by least squares."""
    x, y = np.log2(np.array(widths, float)), np.log2(np.array(sizes))
    return float(np.polyfit(x, y, 1)[0])


def check(
    overrides: Sequence[str],
    widths: Sequence[int] = WIDTHS,
    seeds: Sequence[int] = SEEDS,
    updates: int = UPDATES,
) -> dict[str, Any]:
    """Slopes of one optimizer, by activation; geometric means over seeds.

    Returns:
        activation -> {"slope": the one furthest from 0 over the updates, "slopes": at 0..updates,
        "change_slope", "change_slopes": of the change by each update, "rms": width -> sizes,
        "change": width -> sizes of the changes}.
    """
    config = compose([*BASE, *overrides])
    corpus = make_corpus(config.data, 0)
    traces: dict[int, list[dict[str, list[list[float]]]]] = {width: [] for width in widths}
    for width in widths:
        for seed in seeds:
            told = [*overrides, f"model.d_model={width}", f"seed={seed}"]
            traces[width].append(trace(told, updates, corpus))
    result: dict[str, Any] = {}
    for name in ACTIVATIONS:
        rms, change = (
            {
                width: np.exp(np.mean([np.log(one[name][kind]) for one in traces[width]], axis=0))
                for width in widths
            }
            for kind in (0, 1)
        )
        slopes, changes = (
            [
                slope(widths, [sizes[width][t] for width in widths])
                for t in range(len(sizes[widths[0]]))
            ]
            for sizes in (rms, change)
        )
        result[name] = {
            "slope": max(slopes, key=abs),
            "slopes": slopes,
            "change_slope": max(changes, key=abs),
            "change_slopes": changes,
            "rms": {str(width): rms[width].tolist() for width in widths},
            "change": {str(width): change[width].tolist() for width in widths},
        }
    return result


def passes(result: Mapping[str, Any]) -> bool:
    """Whether every slope of the checked activations is small, and every update changes them."""
    moved = all(
        size > 0 for name in CHECKED for row in result[name]["change"].values() for size in row
    )
    return moved and all(abs(result[name]["slope"]) <= MOST for name in CHECKED)


def control_fails(result: Mapping[str, Any]) -> bool:
    """Whether the check has power: the control's activations grow with the width."""
    return max(abs(result[name]["slope"]) for name in CHECKED) > CONTROL


def ends(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an arm: the worst slopes, and sizes after the last update, by width."""
    return {
        name: {
            **{key: found[key] for key in ("slope", "change_slope")},
            **{key: {w: row[-1] for w, row in found[key].items()} for key in ("rms", "change")},
        }
        for name, found in result.items()
    }


def picture(result: Mapping[str, Any]) -> Figure:
    """RMS against width after the last update, and of the last change; a curve an activation."""
    arms = list(result)
    figure = Figure(figsize=(2.6 * len(arms), 5.2), layout="constrained")
    axes = figure.subplots(2, len(arms), squeeze=False, sharey="row")
    for column, arm in enumerate(arms):
        for row, key in enumerate(("rms", "change")):
            axis = axes[row][column]
            for colour, name in zip(studies.COLOURS, ACTIVATIONS, strict=False):
                sizes = {int(width): last for width, last in result[arm][name][key].items()}
                axis.plot(list(sizes), list(sizes.values()), "o-", ms=3, color=colour, label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
        axes[0][column].set_title(arm, fontsize=10)
        axes[1][column].set_xlabel("width")
    axes[0][0].set_ylabel("RMS after the last update")
    axes[1][0].set_ylabel("RMS of the last change")
    axes[0][0].legend(fontsize=7)
    return figure


def table(result: Mapping[str, Any]) -> str:
    """Worst slopes, one line an optimizer: of the size, and of the change."""
    head = " ".join(f"{name:>15}" for name in ACTIVATIONS)
    lines = [f"{'size/change':<14} {head}"]
    for arm, found in result.items():
        cells = (
            f"{found[name]['slope']:+.2f}/{found[name]['change_slope']:+.2f}"
            for name in ACTIVATIONS
        )
        lines.append(f"{arm:<14} " + " ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> int:
    """Check every arm; 1 when one that should pass fails, or the control passes."""
    parser = argparse.ArgumentParser(prog="python -m geon.studies.coord_check", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--widths", nargs="+", type=whole(), default=list(WIDTHS))
    parser.add_argument("--seeds", nargs="+", type=whole(0), default=list(SEEDS))
    parser.add_argument("--updates", type=whole(), default=UPDATES)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--draw", action="store_true", help="only draw, from the result file")
    told = parser.parse_intermixed_args(arguments)
    if not told.draw:
        started = time.perf_counter()
        found = {
            arm: check([*ARMS[arm], *told.overrides], told.widths, told.seeds, told.updates)
            for arm in told.arms
        }
        required = {arm: passes(found[arm]) for arm in ("hybrid", "scion") if arm in found}
        if "adamw" in found:
            required["control fails"] = control_fails(found["adamw"])
        kept = {arm: ends(one) for arm, one in found.items()}
        facts = studies.meta(studies.command_line(told, "coord_check"), [])
        facts |= {"widths": told.widths, "seeds": told.seeds, "updates": told.updates}
        facts["seconds"] = round(time.perf_counter() - started, 1)
        studies.save(told.out, "coord_check", {"meta": facts, "verdict": required, **kept})
    verdict = studies.load(told.out, "coord_check").pop("verdict")
    studies.show(told.out, "coord_check", table, picture)
    print(", ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in verdict.items()))
    return 0 if all(verdict.values()) else 1


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
