"""A checkpoint for transformers: python -m geon.scripts.export_hf runs/first_run --out FOLDER.

AutoModelForCausalLM.from_pretrained(FOLDER) loads it without code of ours: gpt as NanoChat, gpt2 as
GPT-2. Gains and other factors are multiplied into the weights, and logits are compared first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from geon.engine.export import export
from geon.engine.saved import open_saved
from geon.launch.leave import guard


def run(arguments: Sequence[str] | None) -> int:
    """Export, and say what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.scripts.export_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    told = parser.parse_args(arguments)
    saved = open_saved(told.run)
    for line in export(saved, told.out):
        print(line)
    print(f"{told.out}: {saved.path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
