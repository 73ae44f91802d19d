"""Draw a run's pictures again from its metrics: python -m geon.scripts.plot runs/first_run."""

import argparse
import json
import sys
from pathlib import Path

from geon.engine.report import draw
from geon.engine.runfolder import METRICS, REPORT
from geon.launch.leave import guard


def main(arguments: list[str] | None = None) -> int:
    """Command line; also works on a run that is still going."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="run folders")
    for folder in parser.parse_args(arguments).run:
        if not (folder / METRICS).exists():
            print(f"geon: error: '{folder}' holds no {METRICS}", file=sys.stderr)
            return 2
        report = folder / REPORT
        for path in draw(folder, json.loads(report.read_text()) if report.exists() else {}):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
