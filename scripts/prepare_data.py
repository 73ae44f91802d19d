"""Make or fetch shards of tokens: python -m geon.scripts.prepare_data COMMAND --help."""

import argparse
import sys

from geon.errors import UsageError
from geon.scripts.prepare_fineweb import add_fineweb
from geon.scripts.prepare_pysources import add_pysources
from geon.scripts.prepare_text import add_tokenize


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    add_tokenize(subparsers)
    add_fineweb(subparsers)
    add_pysources(subparsers)
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"geon: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
