"""Plans of two models at three sizes of the machine, and the pictures of docs/distributed.md.

python -m geon.studies.distributed_plots --plans docs/results/plans.json
python -m geon.studies.distributed_plots --bench docs/results/sharding.json --out docs
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from geon.benches import results
from geon.benches.sharding import words_sent
from geon.engine.build import make_model, make_routing
from geon.engine.planning import plan_ahead
from geon.launch.compose import compose
from geon.launch.leave import guard

MODELS, RANKS = ("124m", "3b"), (8, 64, 1024)
VOCAB = ["data.vocab_size=50304", "model.vocab_size=50304"]
OPTIMIZERS, OBJECTIVES = ("muon", "manifold_muon"), ("time", "bytes")
COLOURS = {"auto": "#111827", "owner": "#2563eb", "gram": "#d97706"}


def plan_rows() -> list[dict[str, Any]]:
    """Plan each model for each number of GPUs, by each objective."""
    rows = []
    for size in MODELS:
        for optim in OPTIMIZERS:
            for objective in OBJECTIVES:
                overrides = [f"model/size={size}", f"optim={optim}", "shard.machine=cuda"]
                config = compose([*overrides, f"shard.objective={objective}", *VOCAB])
                model = make_model(config.model)
                routing = make_routing(model, config.optim)
                for ranks in RANKS:
                    plan = plan_ahead(config, model, routing, ranks)
                    totals, bound = plan.totals(), plan.lower_bound_words()
                    words = sum(words_sent(j) for j in plan.jobs if j.matrix.orthogonalizes)
                    rows.append(
                        {
                            "model": size,
                            "optim": optim,
                            "objective": objective,
                            "ranks": ranks,
                            "transports": dict(Counter(str(job.transport) for job in plan.jobs)),
                            "mib_per_rank": sum(plan.bytes_sent) / ranks / 2**20,
                            "mib_busiest": max(plan.bytes_sent) / 2**20,
                            "words_over_bound": words / ranks / bound if bound else None,
                            "buckets": totals["buckets"],
                            "collectives": totals["collectives_per_step"],
                            "gflop_busiest": max(plan.flops) / 1e9,
                            "owner_balance": totals["owner_balance"],
                            "peak_buffer_mib": plan.peak_buffer / 2**20,
                            "predicted_ms": 1e3 * plan.seconds,
                        }
                    )
                    print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    kinds = " ".join(f"{count} {name}" for name, count in row["transports"].items())
    over = row["words_over_bound"]
    return (
        f"| {row['model']} | {row['optim']} | {row['objective']} | {row['ranks']} | {kinds} | "
        f"{row['mib_per_rank']:.1f} | {row['mib_busiest']:.1f} | "
        f"{'-' if over is None else f'{over:.2f}'} | {row['collectives']} | "
        f"{row['gflop_busiest']:.0f} | {row['owner_balance']:.2f} | "
        f"{row['peak_buffer_mib']:.0f} | {row['predicted_ms']:.2f} |"
    )


def draw(content: dict[str, Any], out: Path) -> None:
    """Measured bytes of each transport beside the bound, and seconds of a step, by layout."""
    rows = [r for r in content["rows"] if r["transport"] in COLOURS]
    layouts = list(dict.fromkeys(r["layout"] for r in rows))
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    for column, rule in enumerate(("muon", "manifold_muon")):
        own = [r for r in rows if r["rule"] == rule]
        for line, (key, scale, label) in enumerate(
            (("bytes_per_rank", 2**20, "MiB sent per rank"), ("seconds", 1, "seconds a step"))
        ):
            axes = panels[line][column]
            for i, (transport, colour) in enumerate(COLOURS.items()):
                values = [
                    next(
                        r[key] / scale
                        for r in own
                        if r["layout"] == layout and r["transport"] == transport
                    )
                    for layout in layouts
                ]
                step = 0.8 / len(COLOURS)
                places = [x + step * (i - (len(COLOURS) - 1) / 2) for x in range(len(layouts))]
                axes.bar(places, values, width=0.95 * step, color=colour, label=transport)
            if key == "bytes_per_rank" and rule == "muon":
                _draw_bound(axes, own, layouts)
            axes.set_xticks(range(len(layouts)), layouts, fontsize=8)
            axes.set_ylabel(label)
            axes.set_title(f"{rule.replace('_', ' ')}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out / "distributed_bytes.png", dpi=130)


def _draw_bound(axes: Any, rows: Sequence[dict[str, Any]], layouts: Sequence[str]) -> None:
    for x, layout in enumerate(layouts):
        bound = next(r["lower_bound_words"] for r in rows if r["layout"] == layout)
        if bound:
            size = 4 * bound / 2**20
            axes.plot([x - 0.4, x + 0.4], [size, size], color="#dc2626", lw=1.6)
    axes.plot([], [], color="#dc2626", label="lower bound")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, help="write the plans here")
    parser.add_argument("--bench", type=Path, help="a result of benches.sharding")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args(argv)
    if arguments.plans is not None:
        command = "python -m geon.studies.distributed_plots --plans"
        content = {"command": command, "rows": plan_rows()}
        results.write(arguments.plans, content)
    if arguments.bench is not None:
        draw(json.loads(arguments.bench.read_text()), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
