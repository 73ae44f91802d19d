"""Bytes of a file, unpacked where it is packed by gzip or zstd, in bounded memory."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from geon.errors import UsageError

CHUNK = 1 << 20
_ZSTD_CHUNK = 1 << 14
"""Smaller: a block of 128 KiB may be packed into a few bytes."""
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = {".gz": "gzip", ".zst": "zstd"}


def packing(path: Path) -> str:
    """How a file is packed, by its first bytes, or by its name: gzip, zstd, or ''.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as opened:
        start = opened.read(4)
    found = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")
    return found or _SUFFIXES.get(path.suffix, "")


def bare_suffix(path: Path) -> str:
    """Suffix of what is packed: .jsonl for a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in _SUFFIXES else path.suffix


def chunks(path: Path, packed: str, start: int = 0, stop: int = 0) -> Iterator[bytes]:
    """Bytes of a file, unpacked, in pieces.

    start, stop: of a file that is not packed, what to read; a stop of 0 is the end.

    Raises:
        UsageError: a file that is cut or damaged, or no `zstandard` package.
        OSError: it cannot be read.
    """
    with path.open("rb") as opened:
        if packed == "zstd":
            yield from _unzstd(path, opened)
            return
        opened.seek(start)
        left = stop - start if stop else CHUNK
        reader = gzip.GzipFile(fileobj=opened) if packed else opened
        if packed and not path.stat().st_size:
            raise _cut(path, packed)
        while left > 0:
            try:
                chunk = reader.read(min(CHUNK, left))
            except EOFError:
                raise _cut(path, packed) from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _damaged(path, packed, error) from None
            if not chunk:
                return
            left -= len(chunk) if stop else 0
            yield chunk


def _unzstd(path: Path, opened: BinaryIO) -> Iterator[bytes]:
    """Frame after frame; the library's own reader takes a cut file for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise UsageError(
            f"'{path}' is packed by zstd, which needs the 'zstandard' package: "
            "pip install 'geon[data]'"
        ) from None
    frame = None
    while chunk := opened.read(_ZSTD_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                text = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _damaged(path, "zstd", error) from None
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
            if text:
                yield text
    if frame is not None or not opened.tell():
        raise _cut(path, "zstd")


def _cut(path: Path, packed: str) -> UsageError:
    return UsageError(
        f"'{path}' ends in the middle of its {packed} data: it is cut; copy or fetch it again"
    )


def _damaged(path: Path, packed: str, error: Exception) -> UsageError:
    return UsageError(
        f"'{path}' is no {packed} file, or damaged ({error}): copy or fetch it again, or rename "
        "it if it is not packed"
    )
