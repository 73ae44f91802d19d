"""One line where a package is missing that training needs and `import geon.optim` does not."""

import sys
from types import TracebackType

from geon.launch.env import wants_traceback

TRAIN = ("hydra", "matplotlib", "numpy", "omegaconf", "tqdm", "yaml")
"""Modules of the extra `train`; yaml comes with omegaconf."""


def missing(error: BaseException | None) -> str:
    """What to install after an import failed; empty where it was not for a package of `train`."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    name = (error.name or "").split(".")[0]
    if name not in TRAIN:
        return ""
    return f"the package '{name}' is not installed: pip install 'geon[train]'"


def tell_missing() -> None:
    """Let a command line that fails as it imports such a package end in one line and status 2.

    `guard` sees only what happens once its file has been read.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not (told := missing(error)) or wants_traceback():
            return before(kind, error, trace)
        print(f"geon: error: {told}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    sys.excepthook = hook
