"""Python sources on this machine: a corpus of tens of millions of tokens without a download."""

import hashlib
import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_APART = ("site-packages", "dist-packages")
"""Folders of installed packages; they may lie inside the standard library's."""
_COPIED = (*_APART, "_vendor", "_vendored", "vendor", "vendored", "extern", "externals")
"""Folders whose files are often also elsewhere, in another version."""


@dataclass
class Sources:
    """Files whose contents differ, and what was left out.

    Attributes:
        files: paths, ordered by the SHA-256 of their contents: the order tells nothing of the text.
        bytes: of those files.
        found: files that were looked at.
        copies: of them, files that another one holds byte by byte, or in another version: a package
            in two environments, or vendored by another one.
        unread: of them, empty files, and those that are not UTF-8 or cannot be read.
    """

    files: list[Path] = field(default_factory=list)
    bytes: int = 0
    found: int = 0
    copies: int = 0
    unread: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.files):,} Python files of {self.bytes / 1e6:.1f} MB; of {self.found:,} "
            f"found, {self.copies:,} are copies and {self.unread:,} empty or not UTF-8"
        )


def roots() -> list[Path]:
    """The standard library, and folders of installed packages, of this interpreter."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    paths = [sysconfig.get_path(name) for name in names]
    packages = [path for path in sys.path if Path(path).name in _APART]
    beside = [str(Path(paths[0]) / name) for name in _APART]  # of the interpreter under a venv
    every = [*paths, *site.getsitepackages(), *packages, *beside]
    real = (Path(path).resolve() for path in every if path)
    return [path for path in dict.fromkeys(real) if path.is_dir()]


def find_sources(folders: Iterable[Path]) -> Sources:
    """Look for *.py files below some folders; each content counts once, and each place once.

    A place is the path below the innermost folder of packages, so that two versions of one file do
    not end up on both sides of a split.

    Cost: reads every file, about 400 MB where torch and transformers are installed.
    """
    by_hash: dict[bytes, Path] = {}
    places: set[Path] = set()
    told = Sources()
    for root, path in _python_files(folders):
        told.found += 1
        try:
            content = path.read_bytes()
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            content = b""
        if not content.strip():
            told.unread += 1
            continue
        digest, place = hashlib.sha256(content).digest(), _place(root, path)
        if digest in by_hash or place in places:
            told.copies += 1
            continue
        by_hash[digest] = path
        places.add(place)
        told.bytes += len(content)
    told.files = [path for _, path in sorted(by_hash.items())]
    return told


def _place(root: Path, path: Path) -> Path:
    parts = path.relative_to(root).parts
    last = max((i for i, part in enumerate(parts[:-1]) if part in _COPIED), default=-1)
    return Path(*parts[last + 1 :])


def _python_files(folders: Iterable[Path]) -> Iterable[tuple[Path, Path]]:
    """(root, file) in the order of paths; a folder inside another is walked once."""
    seen: set[Path] = set()
    for root in folders:
        for folder, below, names in os.walk(root):
            here = Path(folder)
            if here in seen:
                below[:] = []
                continue
            seen.add(here)
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield from ((root, here / name) for name in sorted(names) if name.endswith(".py"))
