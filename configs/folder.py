"""The user's own config files (--config-dir): checked before Hydra reads them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from geon.errors import UsageError, shown

OURS = Path(__file__).resolve().parent
"""The folder of our own config files, which is searched first."""


def search_path(value: Any) -> list[Path]:
    """Folders that `hydra.searchpath=[file://DIR, ...]` names; `file://` may be left out.

    Raises:
        UsageError: an entry that is no folder of files, such as pkg://...
    """
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        told = shown(str(entry))
        if not isinstance(entry, str) or not entry.removeprefix("file://"):
            raise UsageError(f"hydra.searchpath: '{told}' is no folder: write [file://FOLDER]")
        if "://" in entry.removeprefix("file://"):
            raise UsageError(
                f"hydra.searchpath: '{told}' is not a folder of files, and no package is imported "
                "by name from a config: write [file://FOLDER]"
            )
    return [Path(entry.removeprefix("file://")) for entry in entries]


def check_folder(folder: Path, most: int = 1 << 20) -> None:
    """Check the user's own config files before Hydra reads them (--config-dir).

    Raises:
        UsageError: names the file: no yaml, too large, nested without end, or hidden by ours.
    """
    if not folder.is_dir():
        raise UsageError(
            f"--config-dir (or hydra.searchpath) '{shown(str(folder))}' is not a folder"
        )
    for file in sorted(folder.rglob("*.yaml")):
        try:
            size = file.stat().st_size
            if size > most:
                raise UsageError(f"'{shown(str(file))}' has {size} bytes, over {most}")
            _check_nodes(file.read_text("utf-8"))
            own = OURS / file.relative_to(folder)
            if own.is_file() and own.read_bytes() != file.read_bytes():
                raise UsageError(
                    f"'{shown(str(file))}' would not be read: configs/{file.relative_to(folder)} "
                    "has its name, and comes first; give it another"
                )
        except (OSError, ValueError, RecursionError) as error:
            if isinstance(error, UsageError) and str(file) in str(error):
                raise
            told = shown(" ".join(str(error).split()))
            raise UsageError(f"'{shown(str(file))}' cannot be read as yaml: {told}") from None


def _check_nodes(text: str, most: int = 100_000) -> None:
    """Count the nodes of a yaml text with every alias written out: a few lines can hold billions.

    Raises:
        ValueError: no yaml, a node inside of itself, or too many.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        yaml.safe_load(text)  # what no tag of plain data stands for is refused here
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    counted: dict[int, int] = {}
    above: set[int] = set()

    def count(node: Any) -> int:
        if isinstance(node, yaml.ScalarNode) or node is None:
            return 1
        if id(node) in above:
            raise ValueError("an anchor holds itself")
        if id(node) not in counted:
            above.add(id(node))
            counted[id(node)] = 1 + sum(count(one) for one in _children(node))
            above.remove(id(node))
        return counted[id(node)]

    if (nodes := count(root)) > most:
        raise ValueError(f"{nodes:.0e} values with its aliases written out, over {most}")


def _children(node: Any) -> Iterable[Any]:
    """What lies directly in a mapping or a sequence."""
    for one in node.value:
        yield from one if isinstance(one, tuple) else (one,)
