"""How the best rate moves with the tokens and the batch of a run, fitted to what was searched.

python -m geon.studies.rate_rule                     # fit, and hold it against other searches
python -m geon.studies.rate_rule --tokens 1.7e9 --batch 524288

Reads results/batch.json (batches at fixed tokens), horizon.json (lengths at a fixed batch) and
transfer.json (widths at both fixed), fits log lr* = c + a log tokens + b log batch for each arm by
least squares over the best rates inside their grids, and says what the fit gives for searches that
it has not seen. Writes results/rate_rule.json.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from geon.launch.leave import guard
from geon.studies import shared as studies
from geon.studies.transfer import best_lr

ARMS = ("hybrid", "muon")


class Found(NamedTuple):
    """The best rate of a search."""

    source: str
    tokens: float
    batch: float
    lr: float


def searched(results: Path, arm: str) -> list[Found]:
    """Best rates inside their grids, of the three searches that the fit is made of."""
    found = []
    for batch, row in studies.load(results, "batch")[arm].items():
        curve = {float(lr): dict(enumerate(by_seed)) for lr, by_seed in row["by_lr"].items()}
        found.append(("batch", 409_600, int(batch), *best_lr(curve)))
    horizon = studies.load(results, "horizon")
    for name in (name for name in horizon if name.startswith(f"{arm}_")):
        row = horizon[name]
        curve = {float(lr): {0: loss} for lr, loss in row["search"].items() if loss is not None}
        found.append(("horizon", row["tokens"], 512, *best_lr(curve)))
    transfer = studies.load(results, "transfer")[arm]
    for width, lr in transfer["lr_star"].items():
        inside = transfer["lr_inside_grid"][width]
        found.append((f"transfer, width {width}", 204_800, 1024, lr, inside))
    return [Found(*one[:4]) for one in found if one[4]]


def unseen(results: Path, arm: str) -> list[Found]:
    """Best rates of searches that the fit has not seen; docs/evidence.md says what they are."""
    found = []
    if arm == "hybrid":
        row = studies.load(results, "transfer_gpu")[arm]
        found += [
            Found(f"H200, width {width}", 122 * 32_768, 32_768, lr)
            for width, lr in row["lr_star"].items()
            if row["lr_inside_grid"][width]
        ]
    if arm == "muon":
        # scripts/published/track3.json: record 36, 3,250 steps, tuned by others
        found.append(Found("track 3, record 36, published", 3250 * 524_288, 524_288, 0.025))
    return found


def fit(points: Sequence[Found]) -> tuple[float, float, float]:
    """c, a, b of log2 lr* = c + a log2 tokens + b log2 batch, by least squares."""
    rows = [[1.0, np.log2(one.tokens), np.log2(one.batch)] for one in points]
    solved = np.linalg.lstsq(np.array(rows), np.log2([one.lr for one in points]), rcond=None)[0]
    c, a, b = (float(value) for value in solved)
    return c, a, b


def rate(fitted: tuple[float, float, float], tokens: float, batch: float) -> float:
    """Rate that the fit gives."""
    c, a, b = fitted
    return float(2.0 ** (c + a * np.log2(tokens) + b * np.log2(batch)))


def verdict(results: Path, arm: str) -> dict[str, Any]:
    """The fit of an arm, its points, and the searches that it has not seen, in octaves."""
    points = searched(results, arm)
    fitted = fit(points)

    def held(some: Sequence[Found]) -> list[dict[str, Any]]:
        return [
            {
                **one._asdict(),
                "fit": (says := rate(fitted, one.tokens, one.batch)),
                "octaves": float(np.log2(says / one.lr)),
            }
            for one in some
        ]

    inside, outside = held(points), held(unseen(results, arm))
    return {
        "constant": 2.0 ** fitted[0],
        "tokens_power": fitted[1],
        "batch_power": fitted[2],
        "rms_octaves": float(np.sqrt(np.mean([one["octaves"] ** 2 for one in inside]))),
        "points": inside,
        "unseen": outside,
    }


def table(arm: str, found: dict[str, Any]) -> str:
    """One arm as markdown."""
    lines = [
        f"{arm}: lr* = {found['constant']:.4f} tokens^{found['tokens_power']:.3f} "
        f"batch^{found['batch_power']:.3f}, rms {found['rms_octaves']:.3f} octaves over "
        f"{len(found['points'])} searches",
        "",
        "| search | tokens | batch | best rate | fit | octaves |",
        "|---|---|---|---|---|---|",
    ]
    for kind, rows in (("", found["points"]), ("not in the fit: ", found["unseen"])):
        lines += [
            f"| {kind}{one['source']} | {one['tokens']:,.0f} | {one['batch']:,.0f} | "
            f"{one['lr']:.4f} | {one['fit']:.4f} | {one['octaves']:+.2f} |"
            for one in rows
        ]
    return "\n".join([*lines, ""])


def run(arguments: Sequence[str]) -> int:
    """Fit, print and write."""
    parser = argparse.ArgumentParser(prog="python -m geon.studies.rate_rule", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="results/ lies there")
    parser.add_argument("--tokens", type=float, help="of a run whose rate is wanted")
    parser.add_argument("--batch", type=float, help="its tokens a step")
    told = parser.parse_args(arguments)
    if (told.tokens is None) != (told.batch is None):
        parser.error("--tokens and --batch go together")
    found = {arm: verdict(told.out, arm) for arm in ARMS}
    for arm, row in found.items():
        if told.tokens:
            fitted = np.log2(row["constant"]), row["tokens_power"], row["batch_power"]
            print(f"{arm}: {rate(fitted, told.tokens, told.batch):.4g}")
        else:
            print(table(arm, row))
    if not told.tokens:
        facts = {"command": "python -m geon.studies.rate_rule"}
        studies.save(told.out, "rate_rule", {"meta": facts, **found})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
