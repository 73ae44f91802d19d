"""What a corpus is, and the one that is on every machine: the standard library's own source."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Sequence
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

    def windows(self, context: int) -> int:
        """How many windows of `context` tokens there are, a last target beside them."""
        return (len(self) - 1) // context

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
    corpus = corpus_of(*join_split(texts, val_percent), "Python standard library", ByteCodec())
    corpus.facts |= {"files": len(files), "python": platform.python_version()}
    return corpus


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"'{path}' of data=stdlib cannot be read ({error.strerror}): make it readable, or "
            "choose other text by data=text"
        ) from None


def join_split(texts: dict[str, bytes], val_percent: float) -> tuple[bytes, bytes]:
    """Concatenate the training files and the validation files, each behind a separator."""
    is_val = split_by_name(list(texts), val_percent)
    chosen = list(zip(texts.values(), is_val, strict=True))
    return joined(t for t, val in chosen if not val), joined(t for t, val in chosen if val)


def joined(texts: Iterable[bytes]) -> bytes:
    """Texts, each behind a separator."""
    return b"".join(SEPARATOR + text for text in texts)


def corpus_of(train: bytes, val: bytes, name: str, codec: Codec) -> Corpus:
    """A corpus of two texts in memory."""

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
