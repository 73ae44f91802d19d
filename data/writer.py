"""Shards that are written in order, and a journal from which a killed writer goes on."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np

from geon.data.meta import META, SPLITS, ShardFile, SplitMeta
from geon.data.shards import HEADER_BYTES, VERSIONS, header
from geon.errors import UsageError

JOURNAL = ".tokenize.json"
TOKENIZER = "tokenizer.json"
_FIRST = {"train": 1, "val": 0}
"""Number of each split's first shard."""


class SplitWriter:
    """Shards of one split. The last is NAME.part until it is full, or the end.

    Attributes:
        shards: finished ones.
        documents, bytes: of all tokens that were added.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, state: Mapping[str, Any]
    ) -> None:
        """state: what `state` gave, or nothing.

        Raises:
            UsageError: a shard that the state names is not there.
            OSError: as the system says.
        """
        self._folder, self._split, self._most = folder, split, shard_tokens
        self._version, self._dtype = next(v for v in VERSIONS.items() if v[1] == np.dtype(dtype))
        self.shards = [ShardFile(**one) for one in state.get("shards", [])]
        self.documents, self.bytes = state.get("documents", 0), state.get("bytes", 0)
        self._open_tokens = state.get("open", 0)
        self._file: BufferedRandom | None = None
        self._recover()

    def add(self, ids: np.ndarray) -> None:
        """Append tokens; a full shard is finished."""
        while len(ids):
            file = self._opened()
            piece = ids[: self._most - self._open_tokens]
            file.write(np.ascontiguousarray(piece, self._dtype).tobytes())
            self._open_tokens, ids = self._open_tokens + len(piece), ids[len(piece) :]
            if self._open_tokens == self._most:
                self.finish()

    def finish(self) -> None:
        """End the shard that is open, if one is: it gets its header and its name."""
        if not self._open_tokens:
            return
        file, final = self._opened(), self._path()
        file.flush()
        file.seek(0)
        file.write(header(self._open_tokens, self._version))
        self.sync()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.close()
        _part(final).replace(final)
        self.shards.append(ShardFile(final.name, self._open_tokens, digest))
        self._open_tokens = 0

    def sync(self) -> None:
        """Bring what was added to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def state(self) -> dict[str, Any]:
        """All that another writer needs to go on, for JSON."""
        return {
            "shards": [asdict(one) for one in self.shards],
            "open": self._open_tokens,
            "documents": self.documents,
            "bytes": self.bytes,
        }

    def meta(self) -> SplitMeta:
        """What was written."""
        return SplitMeta(tuple(self.shards), self.documents, self.bytes)

    def _path(self, further: int = 0) -> Path:
        number = _FIRST[self._split] + len(self.shards) + further
        return self._folder / f"tokens_{self._split}_{number:06d}.bin"

    def _opened(self) -> BufferedRandom:
        if self._file is None:
            self._file = _part(self._path()).open("w+b")
            self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _recover(self) -> None:
        """Bring the files to the state: what was written after it is cut off, or removed."""
        size = self._dtype.itemsize
        for one in self.shards:
            path = self._folder / one.file
            if not path.is_file() or path.stat().st_size != HEADER_BYTES + size * one.tokens:
                raise UsageError(f"'{path}' is gone or cut, which was finished: {ANEW}")
        final = self._path()
        part = _part(final)
        if final.exists():  # it was finished after the state
            final.replace(part)
        for further in range(1, 10**6):
            if not any([_remove(path := self._path(further)), _remove(_part(path))]):
                break
        if not self._open_tokens:
            _remove(part)
            return
        length = HEADER_BYTES + size * self._open_tokens
        if not part.is_file() or part.stat().st_size < length:
            raise UsageError(f"'{part}' is gone or cut, which was under way: {ANEW}")
        self._file = part.open("r+b")
        self._file.truncate(length)
        self._file.seek(length)


ANEW = "start anew with --resume never"


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


@dataclass
class Journal:
    """What a writer has done, and of what.

    Attributes:
        key: what the shards depend on.
        place: where the reading goes on.
        splits: states of the writers.
        done: meta.json is written.
    """

    key: dict[str, Any]
    place: dict[str, Any]
    splits: dict[str, Any]
    done: bool = False

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        path = folder / JOURNAL
        aside = path.with_name(path.name + ".new")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def read_journal(folder: Path) -> Journal | None:
    """The journal of a folder, if it has one.

    Raises:
        UsageError: one that cannot be read.
    """
    path = folder / JOURNAL
    try:
        return Journal(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"'{path}' cannot be read ({error}): {ANEW}") from None


def clear(folder: Path) -> None:
    """Remove what an earlier writer left: meta.json, tokenizer, shards, and last its journal."""
    for path in [folder / META, *_written(folder), folder / TOKENIZER, folder / JOURNAL]:
        _remove(path)


def holds(folder: Path) -> str:
    """Name of a file in a folder that a writer would write over; empty where there is none."""
    paths = [folder / META, folder / TOKENIZER, *_written(folder)]
    return next((path.name for path in paths if path.exists()), "")


def _written(folder: Path) -> list[Path]:
    """Shards, finished or not."""
    names = [f"tokens_{split}_*.bin{end}" for split in SPLITS for end in ("", ".part")]
    return [path for name in names for path in sorted(folder.glob(name))]
