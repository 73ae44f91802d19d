"""The `.bin` shards of the NanoGPT speedrun: 256 int32 of header, then uint16 token ids."""

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from geon.data.corpus import Corpus, Split
from geon.errors import UsageError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS

_EDGE, _PLACE, _PLACES = 1 << 20, 1 << 16, 8
"""Bytes of both ends, bytes of a place between them, and how many, that a fingerprint takes."""


def write_bin(path: str | Path, tokens: np.ndarray) -> None:
    """Write one shard.

    Raises:
        UsageError: an id that uint16 cannot hold, or tokens that are no list of whole numbers.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(
            f"tokens for '{path}' are {tokens.dtype} of shape {tokens.shape}: give one row of "
            "whole numbers"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**16:
        raise UsageError(
            f"token ids {tokens.min()} to {tokens.max()} do not fit the uint16 of '{path}'"
        )
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with Path(path).open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())


class Shard:
    """Tokens of one open shard, read where they are asked for.

    By `pread`, which is as fast as a map of the file, and where a shard has been cut while a run
    reads it comes back short; a map would end the process with SIGBUS.
    """

    def __init__(self, path: Path, file: int, count: int, vocab_size: int) -> None:
        self.path, self._file, self._count, self._vocab = path, file, count, vocab_size

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        os.close(self._file)

    def __getitem__(self, where: slice) -> np.ndarray:
        """Tokens of a slice without a step.

        Raises:
            UsageError: the file has become shorter, or holds an id outside of the vocabulary;
                names the file and the place.
            OSError: it cannot be read.
        """
        start, stop, _ = where.indices(self._count)
        offset, size = HEADER_BYTES + 2 * start, 2 * max(0, stop - start)
        data = self._read(offset, size)
        tokens = np.frombuffer(data, dtype="<u2")
        if self._vocab < 2**16 and size and (top := int(tokens.max())) >= self._vocab:
            raise UsageError(
                f"'{self.path}' holds token id {top} at position "
                f"{start + int(np.argmax(tokens == top))}, at or above data.vocab_size "
                f"{self._vocab}"
            )
        return tokens

    def _read(self, offset: int, size: int) -> bytes:
        """Bytes of the file; a system may give at most 2 GiB at a time."""
        pieces = []
        while size > 0:
            try:
                piece = os.pread(self._file, min(size, 1 << 30), offset)
            except OSError as error:
                where = f"{error.strerror}, at byte {offset}"
                raise OSError(error.errno, where, str(self.path)) from None
            if not piece:
                raise UsageError(
                    f"'{self.path}' ends at byte {os.fstat(self._file).st_size}, before byte "
                    f"{offset + size} that was to be read: it was whole when the run began, and "
                    "has been cut since; fetch it again, and start the run again to go on"
                )
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def check(self, step: int = 1 << 24) -> None:
        """Look at every id, in pieces, so that a shard never has to fit in memory.

        Raises:
            UsageError: as reading does.
        """
        if self._vocab < 2**16:
            for start in range(0, self._count, step):
                self[start : start + step]

    def fingerprint(self) -> str:
        """SHA-256 of the size, of the first and the last MiB, and of places between them.

        Cost: 2.5 MiB are read, of a shard of any size. A change between those places is missed;
        another shard, or another part of one, is not.
        """
        size = HEADER_BYTES + 2 * self._count
        edge = min(size, _EDGE)
        between = [size * i // (_PLACES + 1) for i in range(1, _PLACES + 1)]
        digest = hashlib.sha256(str(size).encode())
        digest.update(self._read(0, edge))
        for place in between:
            digest.update(self._read(place, min(_PLACE, size - place)))
        digest.update(self._read(size - edge, edge))
        return digest.hexdigest()


def open_bin(path: Path, vocab_size: int, key: str) -> Shard:
    """Open one shard after checking its header against its size.

    Raises:
        UsageError: names the file, the field, what was found and what was expected.
    """
    if not path.is_file():
        raise UsageError(f"'{path}' is not a file ({key})")
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror} ({key})") from None
    try:
        size, start = os.fstat(file).st_size, os.pread(file, HEADER_BYTES, 0)
        count = _tokens_promised(path, size, start, key)
    except OSError as error:
        os.close(file)
        raise UsageError(f"'{path}' cannot be read: {error.strerror} ({key})") from None
    except UsageError:
        os.close(file)
        raise
    return Shard(path, file, count, vocab_size)


def _tokens_promised(path: Path, size: int, start: bytes, key: str) -> int:
    """Number of tokens that a header promises, held against the size of the file."""
    if len(start) < HEADER_BYTES:
        raise UsageError(
            f"'{path}' has {size} bytes, less than its {HEADER_BYTES} of header ({key})"
        )
    magic, version, count = (int(x) for x in np.frombuffer(start, dtype="<i4", count=3))
    if magic != MAGIC:
        raise UsageError(
            f"'{path}' starts with {magic}, not the magic {MAGIC} of a shard ({key}): ids "
            "without a header, as nanoGPT's, become a shard by geon.data.write_bin"
        )
    if version != VERSION:
        raise UsageError(f"'{path}' is of version {version}, expected {VERSION} ({key})")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise UsageError(
            f"'{path}' promises {count} tokens, so {expected} bytes, but has {size}: truncated or "
            f"corrupt, fetch it again ({key})"
        )
    return count


def _matched(pattern: str, key: str) -> list[Path]:
    """Files that a glob matches, in the order of their names."""
    paths = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser())))]  # noqa: PTH207
    if not pattern or not paths:
        raise UsageError(f"{key} '{pattern}' matches no file (looked in {Path.cwd()})")
    return paths


def _check_distinct(found: Mapping[str, Sequence[Path]]) -> None:
    """Refuse a file that is read twice under any name.

    Raises:
        UsageError: names both paths and their keys.
    """
    seen: dict[Path, tuple[Path, str]] = {}
    for key, paths in found.items():
        for path in paths:
            real = path.resolve()
            if real in seen:
                first, where = seen[real]
                raise UsageError(
                    f"'{path}' ({key}) is the same file as '{first}' ({where}): validation must "
                    "not read what is trained on, nor a split one file twice; narrow the globs"
                )
            seen[real] = path, key


def open_bins(train: str, val: str, vocab_size: int) -> Corpus:
    """Open all shards that two globs match, in the order of their names.

    Raises:
        UsageError: a glob that matches nothing, a file matched twice, or a bad shard.
    """
    found = {key: _matched(p, key) for key, p in (("data.train", train), ("data.val", val))}
    _check_distinct(found)
    shards = {key: [open_bin(p, vocab_size, key) for p in paths] for key, paths in found.items()}
    digest = hashlib.sha256()
    for key, opened in shards.items():
        digest.update(key.encode())
        for shard in opened:
            shard.check()
            digest.update(shard.fingerprint().encode())
    splits = [
        Split(f"{key} '{pattern}'", shards[key])
        for key, pattern in (("data.train", train), ("data.val", val))
    ]
    return Corpus(
        train=splits[0],
        val=splits[1],
        vocab_size=vocab_size,
        codec=None,
        val_text=b"",
        facts={
            "name": train,
            "train_tokens": len(splits[0]),
            "val_tokens": len(splits[1]),
            "sha256": digest.hexdigest(),
        },
    )
