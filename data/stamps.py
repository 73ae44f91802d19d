"""The largest id of every file of tokens, looked for once: it is kept in a stamp.

A stamp lies beside the file (`.NAME.ids.json`) or, where that folder is read-only, in the user's
cache. It holds for a size, a time of change and a fingerprint. Processes of one machine that open
the same files share the work: each takes a file that no other looks at.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from geon.data.shards import Shard

try:
    import fcntl
except ImportError:  # not a Unix: every process looks for itself
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
_PATIENCE, _SLOWEST, _POLL = 30.0, 20e6, 0.1
"""Seconds, and bytes a second, that another process is waited for; seconds between two looks."""


def check_ids(shards: Sequence[Shard], vocab_size: int) -> None:
    """Refuse an id at or above a vocabulary in any file; reads only files without a stamp.

    Raises:
        UsageError: names the file and the place.
    """
    for shard, top in zip(shards, top_ids(shards), strict=True):
        if top >= vocab_size:
            shard.check()


def top_ids(shards: Sequence[Shard]) -> list[int]:
    """Largest id of every file, -1 where it is empty; reads only files without a stamp.

    Raises:
        UsageError: an id below 0.
    """
    tops: dict[int, int] = {}
    for wait in (False, True):
        for i, shard in enumerate(shards):
            if i not in tops and (top := _top(shard, wait)) is not None:
                tops[i] = top
    return [tops[i] for i in range(len(shards))]


def _top(shard: Shard, wait: bool) -> int | None:
    """Largest id of a file; None where another process looks for it, unless that is waited for."""
    size, changed = shard.state()
    known = {"format": FORMAT, "size": size, "mtime_ns": changed, "sha256": shard.fingerprint()}
    if (top := _read(shard.path, known)) is not None:
        return top
    limit = _PATIENCE + size / _SLOWEST if wait else 0.0
    with _alone(shard.path, limit) as alone:
        if (top := _read(shard.path, known)) is not None:  # found meanwhile
            return top
        if not alone and not wait:
            return None
        top = shard.top()
        if shard.state() == (size, changed):
            _write(shard.path, known | {"max": top})
    return top


def _places(path: Path) -> Iterator[Path]:
    """Where the stamp of a file may lie, best first."""
    yield path.with_name(f".{path.name}.ids.json")
    name = f"{_key(path)}.json"
    with suppress(RuntimeError):  # no home
        yield Path.home() / ".cache" / "geon" / "ids" / name
    yield _own_folder() / name


def _key(path: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]


def _own_folder() -> Path:
    """A folder of this user's among temporary files; of locks, and of stamps as a last resort."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"geon-{user}"


def _make_own(folder: Path) -> None:
    """Make the folder among temporary files, where others might have made it to mislead."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(f"'{folder}' is another user's")


def _read(path: Path, known: dict[str, Any]) -> int | None:
    for place in _places(path):
        with suppress(OSError, ValueError, TypeError, KeyError):
            if place.parent == _own_folder():
                _make_own(place.parent)
            found = json.loads(place.read_bytes()[:4096])
            if {key: found[key] for key in known} == known and type(found["max"]) is int:
                return int(found["max"])
    return None


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a stamp to the first place that takes it; where none does, the next run looks again."""
    for place in _places(path):
        aside = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            if place.parent == _own_folder():
                _make_own(place.parent)
            elif place.parent != path.parent:
                place.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content))
            aside.replace(place)
            return
        except OSError:
            with suppress(OSError):
                aside.unlink()


@contextmanager
def _alone(path: Path, limit: float) -> Iterator[bool]:
    """Whether no other process of this machine looks at a file, waited for up to `limit` seconds.

    The lock is the system's: it ends with the process that holds it.
    """
    file = -1
    try:
        _make_own(_own_folder())
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(_own_folder() / f"{_key(path)}.lock", flags, 0o600)
    except OSError:
        pass  # nowhere to lock: each looks for itself
    if fcntl is None or file < 0:
        yield True
        return
    try:
        yield _locked(file, limit)
    finally:
        os.close(file)


def _locked(file: int, limit: float) -> bool:
    end = time.monotonic() + limit
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL)
        except OSError:  # a file system without locks
            return True
