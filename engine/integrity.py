"""Whether a checkpoint is whole, unchanged and one's own: commit.json held against the files.

Format 2 carries the size and SHA-256 of every file and a digest of itself. Format 1, of earlier
versions, has neither: its files are only seen to be there.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from geon.errors import UsageError

FORMAT = 2
COMMIT = "commit.json"
METADATA = ".metadata"
FOLDER = re.compile(r"step-(\d{7,15})")
MOST_STEPS = 10**15
_LONGEST = 256 * 2**20
"""Bytes of the largest commit file that is read; the vocabulary of a tokenizer is in it."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Refused(UsageError):
    """Why a checkpoint must not be used."""


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_STEPS


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


FIELDS: dict[str, tuple[Callable[[Any], bool], Any]] = {
    "step": (_count, ...),
    "model": (lambda x: isinstance(x, dict) and isinstance(x.get("arch"), str), ...),
    "run": (_text, None),
    "segment": (_count, 0),
    "serial": (_count, 0),
    "elapsed": (lambda x: type(x) in (int, float) and 0 <= x < math.inf, 0.0),
    "tokens": (_count, 0),
    "world": (_count, 1),
    "optim": (_text, None),
    "settings": (_mapping, None),
    "seed": (lambda x: x is None or type(x) is int, None),
    "data": (_mapping, None),
    "codec": (_text, None),
    "stream": (_mapping, None),
    "torch": (_text, None),
    "skipped": (lambda x: isinstance(x, list) and all(map(_count, x)), []),
    "state": (_mapping, None),
    "files": (_mapping, None),
}
"""Fields of a commit file: what each must be, and what stands for a missing one (... if none)."""


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a commit file's content but its digest, as canonical JSON."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(_canonical(rest)).hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def sealed(content: Mapping[str, Any]) -> str:
    """Text of a commit file, its digest added."""
    plain = json.loads(json.dumps({"format": FORMAT, **content}))
    return json.dumps({**plain, "sha256": digest(plain)}, indent=2)


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint's commit file, with defaults for what earlier versions left out.

    Raises:
        Refused: says what is wrong with it.
    """
    file = checkpoint / COMMIT
    try:
        _own(checkpoint, "the folder", stat.S_ISDIR)
        if _own(file, COMMIT, stat.S_ISREG).st_size > _LONGEST:
            raise Refused(f"{COMMIT} is larger than {_LONGEST} bytes")
        facts = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise Refused(f"{COMMIT} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{COMMIT} cannot be read ({error})") from None
    _check_facts(facts)
    defaults = {key: default for key, (_, default) in FIELDS.items() if default is not ...}
    facts = {**json.loads(json.dumps(defaults)), **facts}
    named = FOLDER.fullmatch(checkpoint.name)
    if named and int(named[1]) != facts["step"]:
        raise Refused(f"{COMMIT} is of step {facts['step']}, the folder is {checkpoint.name}")
    return facts


def _check_facts(facts: Any) -> None:
    if not isinstance(facts, dict):
        raise Refused(f"{COMMIT} holds no object")
    if (form := facts.get("format")) not in (1, FORMAT) or type(form) is not int:
        told = repr(form)[:40]
        raise Refused(f"{COMMIT} is of checkpoint format {told}, expected {FORMAT}")
    if form == FORMAT and facts.get("sha256") != digest(facts):
        raise Refused(f"{COMMIT} was changed: its own SHA-256 does not fit")
    for key, (holds, default) in FIELDS.items():
        if key not in facts and default is ...:
            raise Refused(f"{COMMIT} has no '{key}'")
        if key in facts and not holds(facts[key]):
            raise Refused(f"{COMMIT} says {key} is {repr(facts[key])[:60]}")
    if form == FORMAT:
        _check_manifest(facts.get("files"))


def _check_manifest(files: Any) -> None:
    if not files or METADATA not in files:
        raise Refused(f"{COMMIT} lists no {METADATA}")
    for name, entry in files.items():
        if not plain_name(name) or name == COMMIT:
            raise Refused(f"{COMMIT} lists {name[:80]!r}, which is no file of the folder")
        whole = isinstance(entry, dict) and _count(entry.get("size"))
        if not whole or not _DIGEST.fullmatch(str(entry.get("sha256"))):
            raise Refused(f"{COMMIT} gives no size and SHA-256 of '{name}'")


def plain_name(name: Any) -> bool:
    """Whether this names a file directly inside of a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def _own(path: Path, name: str, kind: Callable[[int], bool]) -> os.stat_result:
    """Refuse a link, another kind of file, another user's, and what everyone may write."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise Refused(f"{name} is a link")
    if not kind(found.st_mode):
        raise Refused(f"{name} is not a {'folder' if kind is stat.S_ISDIR else 'plain file'}")
    if found.st_uid not in (os.geteuid(), 0):
        raise Refused(
            f"{name} belongs to user {found.st_uid}, not to you: copy the folder if you trust it"
        )
    if found.st_mode & stat.S_IWOTH:
        raise Refused(f"{name} can be written by everyone: chmod o-w if you trust it")
    return found


def likely(checkpoint: Path) -> dict[str, Any] | None:
    """Facts of a checkpoint whose commit file holds and whose files have their sizes, or None."""
    try:
        facts = facts_of(checkpoint)
        _check_sizes(checkpoint, facts["files"])
    except (Refused, OSError):
        return None
    return facts


def _check_sizes(checkpoint: Path, files: Mapping[str, Any] | None) -> None:
    """Refuse missing and extra files, links, and files of another size."""
    found = {p.name for p in checkpoint.iterdir()} - {COMMIT}
    if files is None:
        files = dict.fromkeys(found) | {METADATA: None}
    for name in sorted(found - set(files)):
        raise Refused(f"'{name}' is not of this checkpoint")
    for name, entry in sorted(files.items()):
        if name not in found:
            raise Refused(f"'{name}' is missing")
        size = _own(checkpoint / name, f"'{name}'", stat.S_ISREG).st_size
        if entry is not None and size != entry["size"]:
            raise Refused(f"'{name}' has {size:,} bytes, {entry['size']:,} were written")


def check(checkpoint: Path) -> dict[str, Any]:
    """Facts of a checkpoint that may be used; reads every byte of it.

    Raises:
        Refused: names the file that is missing, changed, foreign or not one of the checkpoint.
    """
    try:
        facts = facts_of(checkpoint)
        files = facts["files"]
        _check_sizes(checkpoint, files)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            names = sorted(files or ())
            found = pool.map(lambda name: _sha256(checkpoint / name), names)
            for name, sha256 in zip(names, found, strict=True):
                if sha256 != files[name]["sha256"]:
                    raise Refused(f"'{name}' was changed: its SHA-256 does not fit")
        _check_index(checkpoint)
    except OSError as error:
        name = Path(error.filename or checkpoint).name
        raise Refused(f"'{name}' cannot be read ({error.strerror})") from None
    return facts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_index(checkpoint: Path) -> None:
    from geon.engine.reading import TensorReader  # it needs torch.distributed.checkpoint

    TensorReader(checkpoint).read_metadata()


def sound(checkpoint: Path) -> str | None:
    """Why a checkpoint must be refused; None when it is whole. Reads every byte of it."""
    try:
        check(checkpoint)
    except Refused as error:
        return str(error)
    return None
