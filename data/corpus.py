"""Text as tokens: the standard library's own source, or any UTF-8 file or folder."""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from geon.data.codec import ByteCodec, Codec
from geon.data.hf import Where
from geon.errors import UsageError

SEPARATOR = b"\x00"
"""Between files: a byte that text does not hold, so a model can learn where files end."""

_SKIPPED = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "idlelib",
}


class Segment(Protocol):
    """Tokens that are read by slices: an array, or an open file."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> np.ndarray: ...


@dataclass
class Split:
    """A run of tokens held in memory or read from disk, in one or more segments."""

    name: str
    segments: Sequence[Segment]
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum([len(s) for s in self.segments])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length), across segment borders."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while length > 0:
            segment, offset = self.segments[first], start - int(self.starts[first])
            piece = segment[offset : offset + length]
            pieces.append(piece)
            start, length, first = start + len(piece), length - len(piece), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass
class Corpus:
    """Training and validation tokens, and what is needed to talk about them in bytes.

    Attributes:
        train, val: the splits; no file is in both.
        vocab_size: token ids are below this.
        codec: text <-> ids; None when the ids' text is not known.
        val_text: the bytes that `val` encodes; empty when not known.
        facts: counts, hashes and versions for the log.
        parts, shares: of a mixture, the corpora by name, and the part of the windows that each has.
        stream: the dataset of a stream, whose `train` holds nothing, and `val` what has been read.
    """

    train: Split
    val: Split
    vocab_size: int
    codec: Codec | None
    val_text: bytes
    facts: dict[str, Any]
    parts: dict[str, "Corpus"] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    stream: Where | None = None


def split_by_name(names: Sequence[str], val_percent: float) -> list[bool]:
    """Whether each file is validation: by the hash of its name, so adding files moves none."""
    cut = int(val_percent * 100)
    return [
        int.from_bytes(hashlib.sha256(n.encode()).digest()[:4], "big") % 10_000 < cut for n in names
    ]


def stdlib_corpus(val_percent: float) -> Corpus:
    """Python's standard library source as bytes: real text on every machine, no download.

    About 9 MB. The loss is comparable only within one Python version: the facts name it.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED & set(p.relative_to(root).parts)]
    texts = {str(p.relative_to(root)): _read_bytes(p) for p in files}
    corpus = _corpus(*join_split(texts, val_percent), "Python standard library", ByteCodec())
    corpus.facts |= {"files": len(files), "python": platform.python_version()}
    return corpus


def text_corpus(
    path: str, val_percent: float, bpe_vocab: int = 0, codec: Codec | None = None
) -> Corpus:
    """Any UTF-8 file or folder, as bytes, or by a BPE trained on its training part.

    A single file is cut: its last val_percent is validation.

    codec: what the ids of a checkpoint mean; None takes bytes, or trains a BPE.

    Raises:
        UsageError: nothing at the path, not to be read, not UTF-8, too little text, no
            `tokenizers` for BPE, or a codec of another kind than bpe_vocab says.
    """
    if codec is not None and isinstance(codec, ByteCodec) is not (bpe_vocab == 0):
        made = "bytes" if isinstance(codec, ByteCodec) else f"a BPE of {codec.vocab_size} ids"
        raise UsageError(
            f"data.bpe_vocab {bpe_vocab}, but the checkpoint reads its text by {made}: set "
            f"data.bpe_vocab={0 if made == 'bytes' else codec.vocab_size}, or "
            "checkpoint.resume=never"
        )
    texts = _read_texts(path)
    if len(texts) == 1:
        (text,) = texts.values()
        parts = _cut_at_character(text, len(text) - int(len(text) * val_percent / 100))
    else:
        parts = join_split(texts, val_percent)
    for part, what in zip(parts, ("training", "validation"), strict=True):
        if len(part) < 2:
            raise UsageError(
                f"data.path '{path}' leaves {len(part)} bytes of {what} text with "
                f"data.val_percent {val_percent}: give more text or another percentage"
            )
    corpus = _corpus(*parts, path, codec or _make_codec(parts[0], bpe_vocab))
    corpus.facts["files"] = len(texts)
    return corpus


def _make_codec(text: bytes, bpe_vocab: int) -> Codec:
    if not bpe_vocab:
        return ByteCodec()
    if bpe_vocab < 256:
        raise UsageError(f"data.bpe_vocab {bpe_vocab} is below the 256 bytes it starts from")
    try:
        from geon.data.bpe import train_bpe
    except ImportError:
        raise UsageError(
            "data.bpe_vocab needs the 'tokenizers' package: pip install -e '.[bpe]', "
            "or set data.bpe_vocab=0 to train on bytes"
        ) from None
    return train_bpe(text.decode("utf-8"), bpe_vocab)


def _cut_at_character(text: bytes, at: int) -> tuple[bytes, bytes]:
    """Cut near `at`, before a byte that starts a UTF-8 character."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return text[:at], text[at:]


def _files_below(root: Path) -> list[Path]:
    """Files below a folder in the order of their names, but for hidden folders.

    Raises:
        OSError: a folder that may not be listed, which `rglob` would leave out.
    """

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for folder, below, names in os.walk(root, onerror=refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [path for name in names if (path := Path(folder, name)).is_file()]
    return sorted(found)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error, path) from None


def _unreadable(error: OSError, path: Path) -> UsageError:
    return UsageError(
        f"'{error.filename or path}' cannot be read: {error.strerror} (data.path): make it "
        "readable, or choose other text"
    )


def _read_texts(path: str) -> dict[str, bytes]:
    if not path:
        raise UsageError("data.path is not set: data=text needs data.path=FILE_OR_FOLDER")
    root = Path(path).expanduser()
    try:
        if not root.exists():
            raise UsageError(f"data.path '{path}' does not exist (looked in {Path.cwd()})")
        files = [root] if root.is_file() else _files(root, path)
    except OSError as error:
        raise _unreadable(error, root) from None
    texts: dict[str, bytes] = {}
    for file in files:
        relative = file.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if file.suffix == ".jsonl":
            raise UsageError(
                f"'{file}' holds JSON lines, whose signs would be trained on: write the texts "
                "alone to a file for data.path"
            )
        raw = _read_bytes(file)
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"'{file}' is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
                "data.path takes text files only"
            ) from None
        texts[str(relative)] = raw
    if not texts:
        raise UsageError(
            f"data.path '{path}' holds no files (hidden ones, and links to folders, are left out)"
        )
    return texts


def _files(root: Path, path: str, most: int = 100_000, most_bytes: int = 1 << 34) -> list[Path]:
    """Files below a folder, by name, where they may fit in memory.

    Raises:
        UsageError: too many or too large.
        OSError: as `_files_below`.
    """
    files = _files_below(root)
    if len(files) > most or sum(file.stat().st_size for file in files) > most_bytes:
        raise UsageError(
            f"data.path '{path}' holds more than {most} files or {most_bytes >> 30} GiB of "
            "text, which is kept in memory: tokenise it into shards for data=bins"
        )
    return files


def join_split(texts: dict[str, bytes], val_percent: float) -> tuple[bytes, bytes]:
    """Concatenate the training files and the validation files, each behind a separator."""
    is_val = split_by_name(list(texts), val_percent)
    chosen = list(zip(texts.values(), is_val, strict=True))
    train = b"".join(SEPARATOR + text for text, val in chosen if not val)
    val = b"".join(SEPARATOR + text for text, val in chosen if val)
    return train, val


def _corpus(train: bytes, val: bytes, name: str, codec: Codec) -> Corpus:
    def tokens(text: bytes) -> np.ndarray:
        if isinstance(codec, ByteCodec):
            return np.frombuffer(text, dtype=np.uint8)
        return codec.encode(text.decode("utf-8"))

    return Corpus(
        train=Split(f"training text of {name}", [tokens(train)]),
        val=Split(f"validation text of {name}", [tokens(val)]),
        vocab_size=codec.vocab_size,
        codec=codec,
        val_text=val,
        facts={
            "name": name,
            "train_bytes": len(train),
            "val_bytes": len(val),
            "sha256": hashlib.sha256(train + val).hexdigest(),
        },
    )
