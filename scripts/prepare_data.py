"""Make or fetch shards of tokens: python -m geon.scripts.prepare_data COMMAND --help."""

import argparse
import errno
import sys

from geon.data.web import DownloadError
from geon.errors import UsageError
from geon.launch.leave import guard
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
        args.run(args)
    except UsageError as error:
        return _ended(2, error)
    except DownloadError as error:
        return _ended(1, error)
    except OSError as error:
        words = f"'{error.filename or args.out}': {error.strerror or error}"
        if args.kept and error.errno in (errno.ENOSPC, errno.EDQUOT):
            words += f"; {args.kept}: make room, and run the same command again to go on"
        return _ended(1, words)
    except KeyboardInterrupt:
        kept = f"; {args.kept}, run the same command again to go on" if args.kept else ""
        print(f"\ngeon: stopped{kept}", file=sys.stderr)
        return 130
    return 0


def _ended(status: int, words: object) -> int:
    print(f"geon: error: {words}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(guard(main))
