"""Text as tokens: the standard library's own source, or any UTF-8 file or folder."""

import hashlib
import platform
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geon.data.codec import ByteCodec, Codec
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


@dataclass
class Split:
    """A run of tokens held in memory or mapped from disk, in one or more segments."""

    name: str
    segments: Sequence[np.ndarray]
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
    """

    train: Split
    val: Split
    vocab_size: int
    codec: Codec | None
    val_text: bytes
    facts: dict[str, Any]


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
    texts = {str(p.relative_to(root)): p.read_bytes() for p in files}
    corpus = _corpus(*join_split(texts, val_percent), "Python standard library", ByteCodec())
    corpus.facts |= {"files": len(files), "python": platform.python_version()}
    return corpus


def text_corpus(path: str, val_percent: float, bpe_vocab: int = 0) -> Corpus:
    """Any UTF-8 file or folder, as bytes, or by a BPE trained on its training part.

    A single file is cut: its last val_percent is validation.

    Raises:
        UsageError: nothing at the path, not UTF-8, too little text, or no `tokenizers` for BPE.
    """
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
    corpus = _corpus(*parts, path, _make_codec(parts[0], bpe_vocab))
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


def _read_texts(path: str) -> dict[str, bytes]:
    if not path:
        raise UsageError("data.path is not set: data=text needs data.path=FILE_OR_FOLDER")
    root = Path(path).expanduser()
    if not root.exists():
        raise UsageError(f"data.path '{path}' does not exist (looked in {Path.cwd()})")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    texts: dict[str, bytes] = {}
    for file in files:
        relative = file.relative_to(root)
        if any(part.startswith(".") for part in relative.parts):
            continue
        raw = file.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"'{file}' is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
                "data.path takes text files only"
            ) from None
        texts[str(relative)] = raw
    if not texts:
        raise UsageError(f"data.path '{path}' holds no files")
    return texts


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
