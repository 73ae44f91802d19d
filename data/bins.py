"""The `.bin` shards of the NanoGPT speedrun: 256 int32 of header, then uint16 token ids."""

import glob
from pathlib import Path

import numpy as np

from geon.data.corpus import Corpus, Split
from geon.errors import UsageError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS


def write_bin(path: str | Path, tokens: np.ndarray) -> None:
    """Write one shard.

    Raises:
        UsageError: an id that uint16 cannot hold.
    """
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 2**16:
        raise UsageError(
            f"token ids {tokens.min()} to {tokens.max()} do not fit the uint16 of '{path}'"
        )
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    with Path(path).open("wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def open_bin(path: Path, vocab_size: int, key: str) -> np.ndarray:
    """Map one shard after checking its header against its size, and its ids.

    Raises:
        UsageError: names the file, the field, what was found and what was expected.
    """
    if not path.is_file():
        raise UsageError(f"'{path}' is not a file ({key})")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UsageError(
            f"'{path}' has {size} bytes, less than its {HEADER_BYTES} of header ({key})"
        )
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, count = (int(x) for x in header[:3])
    if magic != MAGIC:
        raise UsageError(f"'{path}' starts with {magic}, not the magic {MAGIC} of a shard ({key})")
    if version != VERSION:
        raise UsageError(f"'{path}' is of version {version}, expected {VERSION} ({key})")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise UsageError(
            f"'{path}' promises {count} tokens, so {expected} bytes, but has {size}: truncated or "
            f"corrupt, fetch it again ({key})"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    top = _largest(tokens)
    if top >= vocab_size:
        where = int(np.argmax(tokens == top))
        raise UsageError(
            f"'{path}' holds token id {top} at position {where}, at or above data.vocab_size "
            f"{vocab_size}"
        )
    return tokens


def _largest(tokens: np.ndarray, step: int = 1 << 24) -> int:
    """Largest id, read in pieces so that a shard never has to fit in memory."""
    return max((int(tokens[i : i + step].max()) for i in range(0, len(tokens), step)), default=0)


def open_bins(train: str, val: str, vocab_size: int) -> Corpus:
    """Map all shards that two globs match, in the order of their names.

    Raises:
        UsageError: a glob that matches nothing, or a bad shard.
    """
    splits = []
    for pattern, key in ((train, "data.train"), (val, "data.val")):
        paths = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser())))]  # noqa: PTH207
        if not pattern or not paths:
            raise UsageError(f"{key} '{pattern}' matches no file (looked in {Path.cwd()})")
        splits.append(Split(f"{key} '{pattern}'", [open_bin(p, vocab_size, key) for p in paths]))
    return Corpus(
        train=splits[0],
        val=splits[1],
        vocab_size=vocab_size,
        codec=None,
        val_text=b"",
        facts={"name": train, "train_tokens": len(splits[0]), "val_tokens": len(splits[1])},
    )
