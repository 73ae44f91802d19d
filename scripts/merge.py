"""Average the last checkpoints of a run: python -m geon.scripts.merge runs/x --last 3 --out runs/y.

Weights on manifolds are brought back to them. The result can be evaluated and generated from; it
holds no optimizer state to train on with.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

from geon.configs.check import resolve
from geon.configs.schema import Config
from geon.engine import build, checkpoint, runfolder
from geon.engine.merge import merge, save
from geon.errors import UsageError
from geon.launch.leave import guard


def config_of(run: Path) -> Config:
    """The config that a run folder was made with.

    Raises:
        UsageError: not a run folder.
    """
    file = run / runfolder.CONFIG
    if not file.is_file():
        raise UsageError(f"'{run}' is not a run folder: it holds no {runfolder.CONFIG}")
    loaded = OmegaConf.load(file)
    return resolve(loaded)  # type: ignore[arg-type]


def run(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--last", type=int, default=2, help="newest checkpoints to average")
    parser.add_argument(
        "--decay", type=float, default=1.0, help="share of each over that of the next newer one"
    )
    parser.add_argument("--out", type=Path, required=True, help="new run folder")
    args = parser.parse_args(arguments)
    config = config_of(args.run)
    found = checkpoint.candidates(args.run / "checkpoints")[::-1]
    if args.last < 1 or len(found) < args.last:
        raise UsageError(
            f"--last {args.last}: '{args.run}' holds {len(found)} committed checkpoints "
            "(keep more with checkpoint.keep)"
        )
    if args.out.exists():
        raise UsageError(f"--out '{args.out}' is there already; name a new folder")
    if not 0 < args.decay <= 1:
        raise UsageError(f"--decay must be above 0, at most 1, got {args.decay}")
    paths = found[-args.last :]
    shares = [args.decay**age for age in reversed(range(len(paths)))]
    model = build.make_model(config.model)
    model.to_empty(device="cpu")
    merge(paths, shares, model, build.make_routing(model, config.optim))
    target = save(args.out, model, paths[-1], {"merged": [p.name for p in paths]})
    shutil.copy(args.run / runfolder.CONFIG, args.out / runfolder.CONFIG)
    print(f"{target}: mean of {', '.join(p.name for p in paths)}")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
