"""Figures of a finished run: python -m geon.studies.first_run_report runs/first_run --json."""

import argparse
import json
import sys
from pathlib import Path

from geon.engine.report import table
from geon.engine.runfolder import REPORT
from geon.launch.leave import guard

KEYS = (
    "val_nats_per_byte",
    "zlib",
    "bz2",
    "order0",
    "train_seconds",
    "tokens",
    "tokens_per_second",
    "matrices_orthogonalized_per_step",
    "optimizer_share",
)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(arguments)
    path = args.run / REPORT
    if not path.exists():
        print(f"geon: error: '{args.run}' holds no {REPORT}: is the run done?", file=sys.stderr)
        return 2
    facts = json.loads(path.read_text())
    if not args.json:
        print(table(facts))
        return 0
    print(json.dumps({key: facts.get(key) for key in KEYS}))
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
