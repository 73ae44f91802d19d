"""Files of token ids, read where they are asked for.

The shards of the NanoGPT speedrun: 256 int32 of header (20240520, version, count), then the ids:
uint16 in version 1. Version 2 is ours, the same with uint32. Besides, ids without a header, as
nanoGPT's `prepare.py` writes them, and NumPy's `.npy`.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from geon.data import foreign
from geon.errors import UsageError

MAGIC = 20240520
VERSIONS = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
"""Ids of each version of a header."""
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS

_EDGE, _PLACE, _PLACES = 1 << 20, 1 << 16, 8
"""Bytes of both ends, bytes of a place between them, and how many, that a fingerprint takes."""
_NPY = b"\x93NUMPY"


def write_bin(path: str | Path, tokens: np.ndarray, dtype: str = "uint16") -> None:
    """Write one shard.

    dtype: uint16 (version 1), or uint32 (version 2).

    Raises:
        UsageError: an id that the dtype cannot hold, or tokens that are no list of whole numbers.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UsageError(
            f"tokens for '{path}' are {tokens.dtype} of shape {tokens.shape}: give one row of "
            "whole numbers"
        )
    version, kind = next(v for v in VERSIONS.items() if v[1] == np.dtype(dtype))
    most = np.iinfo(kind).max
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= most:
        raise UsageError(
            f"token ids {tokens.min()} to {tokens.max()} do not fit the {dtype} of '{path}'"
        )
    with Path(path).open("wb") as file:
        file.write(header(len(tokens), version))
        file.write(np.ascontiguousarray(tokens, dtype=kind).tobytes())


def header(count: int, version: int = 1) -> bytes:
    """The first 1,024 bytes of a shard of `count` tokens."""
    made = np.zeros(HEADER_INTS, dtype="<i4")
    made[:3] = MAGIC, version, count
    return made.tobytes()


class Shard:
    """Tokens of one open file, read where they are asked for.

    By `pread`, which is as fast as a map of the file, and where a shard has been cut while a run
    reads it comes back short; a map would end the process with SIGBUS.

    dtype: of the ids. offset: bytes before the first of them.
    said: where the vocabulary's size was said.
    """

    def __init__(
        self,
        path: Path,
        file: int,
        count: int,
        vocab_size: int,
        dtype: np.dtype,
        offset: int,
        said: str,
    ) -> None:
        self.path, self._file, self._count, self._vocab = path, file, count, vocab_size
        self.dtype, self._offset, self._said = dtype, offset, said
        self._any_fits = np.iinfo(dtype).min == 0 and np.iinfo(dtype).max < vocab_size
        self._fingerprint = ""

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
        tokens = self._tokens(start, stop)
        if len(tokens) and not self._any_fits:
            if (top := int(tokens.max())) >= self._vocab:
                raise self._outside(start, tokens, top, f"at or above {self._said} {self._vocab}")
            if self.dtype.kind == "i" and (low := int(tokens.min())) < 0:
                raise self._outside(start, tokens, low, "below 0")
        return tokens

    def _outside(self, start: int, tokens: np.ndarray, token: int, words: str) -> UsageError:
        place = start + int(np.argmax(tokens == token))
        return UsageError(f"'{self.path}' holds token id {token} at position {place}, {words}")

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        data = self._read(self._offset + size * start, size * max(0, stop - start))
        return np.frombuffer(data, dtype=self.dtype)

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
        if not self._any_fits:
            for start in range(0, self._count, step):
                self[start : start + step]

    def top(self, step: int = 1 << 24) -> int:
        """Largest id, whatever the vocabulary; -1 where there is none. Reads all of the file.

        Raises:
            UsageError: an id below 0.
        """
        top = -1
        for start in range(0, self._count, step):
            tokens = self._tokens(start, min(start + step, self._count))
            top = max(top, int(tokens.max()))
            if self.dtype.kind == "i" and (low := int(tokens.min())) < 0:
                raise self._outside(start, tokens, low, "below 0")
        return top

    def state(self) -> tuple[int, int]:
        """Size in bytes, and time of the last change in ns, of the open file."""
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def fingerprint(self) -> str:
        """SHA-256 of the size, of the first and the last MiB, and of places between them.

        Cost: 2.5 MiB are read, of a shard of any size. A change between those places is missed;
        another shard, or another part of one, is not.
        """
        if self._fingerprint:
            return self._fingerprint
        size = self._offset + self.dtype.itemsize * self._count
        edge = min(size, _EDGE)
        between = [size * i // (_PLACES + 1) for i in range(1, _PLACES + 1)]
        bare = "" if self._offset else self.dtype.str  # bytes that say of themselves what they are
        digest = hashlib.sha256(f"{size}{bare}".encode())
        digest.update(self._read(0, edge))
        for place in between:
            digest.update(self._read(place, min(_PLACE, size - place)))
        digest.update(self._read(size - edge, edge))
        self._fingerprint = digest.hexdigest()
        return self._fingerprint


def open_bin(
    path: Path, vocab_size: int, key: str, dtype: str = "", said: str = "data.vocab_size"
) -> Shard:
    """Open one file of ids after checking its header against its size.

    key: the config key that named it. dtype: of ids without a header; a header that says another
        one is refused. said: where the vocabulary's size was said.

    Raises:
        UsageError: names the file, the field, what was found and what was expected, and for a file
            that holds no ids the command that makes some of it.
    """
    if path.is_dir():
        raise UsageError(
            f"'{path}' is a folder, not a file ({key}): "
            + (
                f"it has a meta.json, so give data.dir={path} instead"
                if (path / "meta.json").is_file()
                else foreign.in_folder(path)
            )
        )
    if not path.is_file():
        raise UsageError(f"'{path}' is not a file ({key})")
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror} ({key})") from None
    try:
        size, start = os.fstat(file).st_size, os.pread(file, foreign.HEAD_BYTES, 0)
        count, found, offset = _lie_of(path, size, start, key, dtype)
    except OSError as error:
        os.close(file)
        raise UsageError(f"'{path}' cannot be read: {error.strerror} ({key})") from None
    except UsageError:
        os.close(file)
        raise
    if offset and dtype and found != np.dtype(dtype).newbyteorder("<"):
        os.close(file)
        raise UsageError(
            f"'{path}' holds {found.name} by its header, not the {dtype} of "
            f"{'meta.json' if key == 'data.dir' else 'data.dtype, which can be left out'} ({key})"
        )
    return Shard(path, file, count, vocab_size, found, offset, said)


def _lie_of(path: Path, size: int, start: bytes, key: str, dtype: str) -> tuple[int, np.dtype, int]:
    """Number of tokens in a file, their dtype, and the bytes before them."""
    if start.startswith(_NPY):
        return _lie_of_npy(path, size, start, key)
    magic = int.from_bytes(start[:4], "little")
    if magic == MAGIC:
        return _lie_of_shard(path, size, start, key)
    if found := foreign.kind(path, start):
        raise UsageError(
            f"'{path}' is {found}, not token ids ({key}): {foreign.advice(path, found)}"
        )
    if not size:
        raise UsageError(f"'{path}' is empty, 0 bytes: make or fetch it again ({key})")
    if not dtype:
        raise UsageError(
            f"'{path}' starts with {magic}, not the magic {MAGIC} of a shard ({key}): "
            f"{foreign.headerless(path, key)}"
        )
    bare = np.dtype(dtype).newbyteorder("<")
    if size % bare.itemsize:
        raise UsageError(
            f"'{path}' has {size} bytes, which is no whole number of {dtype} ids: truncated, or "
            f"not data.dtype={dtype} ({key})"
        )
    return size // bare.itemsize, bare, 0


def _lie_of_shard(path: Path, size: int, start: bytes, key: str) -> tuple[int, np.dtype, int]:
    if len(start) < HEADER_BYTES:
        raise UsageError(
            f"'{path}' has {size} bytes, less than its {HEADER_BYTES} of header ({key})"
        )
    _, version, count = (int(x) for x in np.frombuffer(start, dtype="<i4", count=3))
    if version not in VERSIONS:
        raise UsageError(
            f"'{path}' is of version {version}, expected 1 (uint16) or 2 (uint32) ({key})"
        )
    dtype = VERSIONS[version]
    expected = HEADER_BYTES + dtype.itemsize * count
    if count < 0 or size != expected:
        raise UsageError(
            f"'{path}' promises {count} tokens, so {expected} bytes, but has {size}: truncated or "
            f"corrupt, fetch it again ({key})"
        )
    return count, dtype, HEADER_BYTES


def _lie_of_npy(path: Path, size: int, start: bytes, key: str) -> tuple[int, np.dtype, int]:
    """The header of a `.npy` says all; arrays of Python objects, which are pickles, are refused."""
    from io import BytesIO

    stream = BytesIO(start)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, EOFError, SyntaxError) as error:
        raise UsageError(f"'{path}' has a broken header of .npy: {error} ({key})") from None
    if dtype.kind not in "ui" or len(shape) != 1:
        raise UsageError(
            f"'{path}' holds {dtype.name} of shape {shape}, expected one row of whole numbers "
            f"({key}): write ids by numpy.save(FILE, ids.astype(numpy.uint16).ravel())"
        )
    expected = stream.tell() + dtype.itemsize * shape[0]
    if size != expected:
        raise UsageError(
            f"'{path}' promises {shape[0]} tokens, so {expected} bytes, but has {size}: truncated "
            f"or corrupt, make or fetch it again ({key})"
        )
    return shape[0], dtype, stream.tell()
