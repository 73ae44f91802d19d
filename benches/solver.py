"""Compare Manifold Muon's direction solvers: quality, products and seconds beside Muon.

python -m geon.benches.solver --size 64 --ratios 1,4 --solvers lgm,muon --json out.json

rho is what a direction attains of the certified fp64 optimum, once it is projected on the tangent
space and divided by max(1, its spectral norm). A step is a direction and the cubic retraction; n3
counts its products of n x n (2 n^3 FLOPs, n the short side), three for one of bf16x3. Squares take
the closed form on every rung. Without options: random cases, about five minutes on two cores.
"""

import argparse
import math
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from geon.benches import results
from geon.benches.contestants import Contestant, choose, costs, label, own_settings, rung
from geon.benches.problems import (
    CASES,
    GAP,
    Problem,
    load_pairs,
    quality,
    random_problems,
    reference,
)
from geon.engine.metrics import hardware
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.optim.polar import minimax
from geon.optim.solvers import lgm
from geon.scripts.flags import whole

Row = dict[str, Any]
RATIOS, WIDE = "1,1.25,2,4,8", "4"
"""Shapes of random problems where none are asked for."""


def compare(
    chosen: Sequence[Contestant],
    problems: Iterable[Problem],
    batch: int = 1,
    repeats: int = 9,
    rho: bool = True,
) -> Iterator[tuple[str, Row]]:
    """Yield (family, row) for each problem and contestant."""
    known_costs: dict[tuple[int, int], list[Row]] = {}
    for p in problems:
        if p.shape not in known_costs:
            known_costs[p.shape] = costs(chosen, p, batch, repeats)
        known = reference(p, rho)
        for c, cost in zip(chosen, known_costs[p.shape], strict=True):
            row = {"solver": c.name, "form": c.form, "dtype": c.dtype, "case": p.case,
                   "d_out": p.shape[0], "d_in": p.shape[1], "seed": p.seed}  # fmt: skip
            yield p.family, row | quality(c.step(p.grad, p.weight), p, known) | cost


def ablations() -> dict[str, Row]:
    """One constant of lgm.py changed at a time, by the name of the change."""
    values = {
        "CG_STEPS": (2, 3, 4, 8),
        "SHIFT": (0.005, 0.01, 0.05, 0.1),
        "SOFT": (2e-6, 2e-4, 2e-3),
        "JITTER": (5e-5, 2e-3, 1e-2),
    }
    roots = ((3e-3, 5), (3e-3, 7), (3e-3, 8), (1e-3, 6), (1e-2, 6))
    refined = {"refine": 1}
    return {
        "as is": {},
        **{f"{key} {value:g}": {key: value} for key in values for value in values[key]},
        **{
            f"ROOT_TABLE minimax({lower:g}, {steps})": {
                "ROOT_STEPS": steps,
                "ROOT_TABLE": minimax(lower, steps),
            }
            for lower, steps in roots
        },
        "share 0": {"share": lambda ratio, refine=0: 0.0},
        "share 1": {"share": lambda ratio, refine=0: 1.0},
        "refine 1": refined,
        **{f"refine 1, OVER_RELAXATION {w:g}": refined | {"OVER_RELAXATION": w} for w in (1, 1.6)},
        "refine 2": {"refine": 2},
    }


def ablate(problems: Iterable[Problem]) -> list[Row]:
    """What each constant of lgm.py is worth, in the Gram form in fp32.

    Raises:
        UsageError: only squares, which lgm does not solve.
    """
    known = [(p, reference(p)) for p in problems if p.shape[0] != p.shape[1]]
    if not known:
        raise UsageError("--ablate needs problems that are not square: give --ratios above 1")
    rows = []
    for setting, change in ablations().items():
        refine = change.get("refine", 0)
        solver = rung("fp32", form="gram", refine=refine)
        constants = {key: value for key, value in change.items() if key != "refine"}
        with patch.multiple(lgm, **{"SHIFT": lgm.SHIFT} | constants):  # wants one at least
            found = [quality(solver.step(p.grad, p.weight), p, about) for p, about in known]
            n3 = lgm.gram_products(4.0, refine)
        rows.append({"setting": setting, "n3_at_ratio_4": n3, **summary(found)})
    return rows


def summary(rows: Sequence[Row]) -> Row:
    """Median and worst of what was measured on several problems."""
    rhos = [row["rho"] for row in rows if row["rho"] is not None]
    return {
        "rho_median": median(rhos) if rhos else None,
        "rho_min": min(rhos, default=None),
        "rho_max": max(rhos, default=None),
        "tangency": max(row["tangency"] for row in rows),
        "spectral_norm": max(row["spectral_norm"] for row in rows),
        "fallbacks": sum(row["fallbacks"] for row in rows),
    }


_COSTS = ("n3", "n3_symmetric_half", "n3_muon", "seconds", "over_muon", "batch")
_QUALITY = "median rho  min rho  tangency    norm"


def _quality(told: Row) -> str:
    rho = [
        f"{told[key]:.4f}" if told[key] is not None else "-" for key in ("rho_median", "rho_min")
    ]
    return f"{rho[0]:>10} {rho[1]:>8}  {told['tangency']:8.1e}  {told['spectral_norm']:6.4f}"


def solver_of(row: Row) -> str:
    """Label of the contestant that a row is of."""
    return label(row["solver"], row["form"], row["dtype"])


def sums(rows: Iterable[Row]) -> Row:
    """Tables for a result file: quality by solver and kind of problem, cost by solver and shape.

    A problem and one of the transposed shape are of one kind.
    """
    kinds: dict[tuple[str, str, int, int], list[Row]] = {}
    shapes: dict[tuple[str, int, int], Row] = {}
    for row in rows:
        name, sides = solver_of(row), (row["d_out"], row["d_in"])
        kinds.setdefault((name, row["case"].split("/")[0], *sorted(sides)), []).append(row)
        shapes.setdefault((name, *sides), row)
    quality_ = [
        {"solver": name, "case": case, "short": short, "long": long, "problems": len(own)}
        | summary(own)
        for (name, case, short, long), own in kinds.items()
    ]
    costs_ = [
        {"solver": name, "d_out": d_out, "d_in": d_in} | {key: row[key] for key in _COSTS}
        for (name, d_out, d_in), row in shapes.items()
    ]
    return {"quality": results.table(quality_), "costs": results.table(costs_)}


def render(rows: Sequence[tuple[str, Row]]) -> str:
    """One table a family of problems."""
    families: dict[str, dict[str, list[Row]]] = {}
    for family, row in rows:
        name = solver_of(row)
        families.setdefault(family, {}).setdefault(name, []).append(row)
    lines = []
    for family, solvers in families.items():
        count = len(next(iter(solvers.values())))
        lines += [f"{family}, {count} problem{'s' if count > 1 else ''}"]
        lines += [f"  {'':<20} {_QUALITY}       n3  / Muon   seconds  / Muon  fell back"]
        for name, own in solvers.items():
            told, row = summary(own), own[0]
            n3 = f"{row['n3']:8.1f} {row['n3'] / row['n3_muon']:7.2f}"
            time_ = f"{row['seconds']:9.2g} {row['over_muon']:7.2f}"
            lines.append(f"  {name:<20} {_quality(told)} {n3} {time_} {told['fallbacks']:10}")
        lines.append("")
    loose = sum((row["gap"] or 0.0) >= GAP for _, row in rows)
    if loose:
        lines += [f"{loose} rows: the optimum is known to more than {GAP:g} only; rho is a bound."]
    return "\n".join(lines).rstrip()


def render_ablation(rows: Sequence[Row]) -> str:
    """One line a setting."""
    lines = [f"{'lgm gram fp32':<30} {_QUALITY}  n3 at r = 4  fell back"]
    for row in rows:
        end = f"{row['n3_at_ratio_4']:12.0f} {row['fallbacks']:10}"
        lines.append(f"{row['setting']:<30} {_quality(row)} {end}")
    return "\n".join(lines)


def render_own(rows: Sequence[tuple[str, Row]]) -> str:
    """Seconds of the published solver over those of lgm, for each shape."""
    found: dict[str, list[Row]] = {}
    for _, row in rows:
        found.setdefault(f"{row['d_out']}x{row['d_in']}", []).append(row)
    lines = ["published solver at its own settings / lgm, seconds of a step"]
    for shape, own in found.items():
        theirs, ours = (next(r["seconds"] for r in own if r["solver"] == name)
                        for name in ("published(own)", "lgm"))  # fmt: skip
        lines.append(f"  {shape:<12} {theirs:.3g} / {ours:.3g} = {theirs / ours:.0f}")
    return "\n".join(lines)


def facts(device: str) -> Row:
    """What every report begins with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"hardware": hardware(device), "versions": versions}


def meta(device: str, module: str, arguments: Sequence[str]) -> Row:
    """Where a result file comes from: hardware, versions, the command that makes it again, date.

    A file or folder that is given by its absolute path is told as PATH.
    """
    words = ["PATH" if Path(word).is_absolute() else word for word in arguments]
    command = shlex.join(["python", "-m", f"geon.benches.{module}", *words])
    return facts(device) | {"command": command, "date": date.today().isoformat()}


def pick_device(word: str) -> str:
    """Resolve --device.

    Raises:
        UsageError: cuda where there is none.
    """
    if word == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return "cuda" if torch.cuda.is_available() and word != "cpu" else "cpu"


def check_output(path: Path | None, option: str = "--json") -> None:
    """Refuse a file that could not be written, before the long measurement.

    Raises:
        UsageError: there is no such folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(f"{option} '{path}': there is no folder '{path.parent}'")


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """What the options ask for.

    Raises:
        UsageError: names the option.
    """
    cases = args.cases.split(",")
    for case in cases:
        if case not in CASES:
            raise UsageError(f"--cases '{case}' is not one of {', '.join(CASES)}")
    for option in ("size", "seeds", "batch", "repeats"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option} must be at least 1, got {getattr(args, option)}")
    chosen = args.ratios or args.wide or args.shape or args.pairs
    ratios = _ratios("ratios", args.ratios if chosen else RATIOS)
    wide = _ratios("wide", args.wide if chosen else WIDE)
    shapes = [(round(r * args.size), args.size) for r in ratios]
    shapes += [(args.size, round(r * args.size)) for r in wide]
    shapes += [_shape(word) for word in args.shape]
    recorded = list(load_pairs(args.pairs)) if args.pairs else []
    return recorded + list(random_problems(cases, dict.fromkeys(shapes), args.seeds))


def _ratios(option: str, words: str | None) -> list[float]:
    try:
        found = [float(word) for word in words.split(",")] if words else []
    except ValueError:
        found = [0.0]
    if any(not 1.0 <= ratio < math.inf for ratio in found):
        raise UsageError(f"--{option} are long/short sides, 1 or more, such as 1,4: got '{words}'")
    return found


def _shape(word: str) -> tuple[int, int]:
    sides = word.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--shape is d_out x d_in such as 768x3072, got '{word}'")
    return int(sides[0]), int(sides[1])


def run(args: argparse.Namespace) -> Row:
    """Measure, print, and return the report.

    Raises:
        UsageError: names the option.
    """
    check_output(args.json)
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = own_settings(device) if args.published_own_settings else choose(args.solvers)
    problems = [p.to(device) for p in problems_of(args)]
    report = facts(device)
    print(report["hardware"], end="\n\n")
    if args.ablate:
        report["ablation"] = ablate(problems)
        print(render_ablation(report["ablation"]))
        return report
    rows = list(compare(chosen, problems, args.batch, args.repeats, not args.no_rho))
    print(render(rows))
    if args.published_own_settings:
        print(f"\n{render_own(rows)}")
    own = [row for _, row in rows]
    return report | ({"rows": own} if args.raw else sums(own))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="also write quality and costs there")
    add("--raw", action="store_true", help="--json: a row for each problem and solver instead")
    add("--solvers", default="", help="names or labels, such as oneshot,lgm-gram-fp32; all if none")
    add("--cases", default=",".join(CASES), help="random momenta: %(default)s")
    add("--size", type=whole(), default=128, help="short side of random cases (%(default)s)")
    add("--ratios", help=f"long/short of tall random cases ({RATIOS}, likewise)")
    add("--wide", help=f"long/short of wide ones ({WIDE}, where no other shapes are asked for)")
    add("--shape", action="append", default=[], metavar="768x3072", help="d_out x d_in; repeatable")
    add("--seeds", type=whole(), default=3, help="random problems of each kind (%(default)s)")
    add("--pairs", type=Path, metavar="FILE", help="torch file {name: [(step, W, momentum), ...]}")
    add("--batch", type=whole(), default=1, help="equal problems in a timed step (%(default)s)")
    add("--repeats", type=whole(), default=9, help="timings of a step (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=whole(0), default=0, help="of a CPU; 0 leaves torch's choice")
    add("--no-rho", action="store_true", help="skip the fp64 optimum: for large shapes")
    add("--published-own-settings", action="store_true",
        help="time the published solver, as published, beside lgm")  # fmt: skip
    add("--ablate", action="store_true", help="vary the constants of lgm.py instead")
    args = parser.parse_args(arguments)

    def act() -> None:
        report = run(args)
        if args.json:
            results.write(args.json, report)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main())
