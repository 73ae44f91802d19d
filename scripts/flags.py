"""Types of number flags: out of range is an error of the command line, not of what it starts."""

import argparse
from collections.abc import Callable


def whole(low: int = 1, high: int = 10**7) -> Callable[[str], int]:
    """A whole number from `low` to `high`, for `type=` of a flag."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return read


def number(low: float = 0.0, high: float = 1e9) -> Callable[[str], float]:
    """A finite number above `low`, to `high`, for `type=` of a flag."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not above {low} and at most {high}")
        return value

    return read
