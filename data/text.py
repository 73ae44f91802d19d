"""Anyone's text as a corpus in memory: files, folders, JSON lines and tables, packed or not."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geon.data.codec import ByteCodec, Codec
from geon.data.corpus import Corpus, Split, corpus_of, joined, split_by_name
from geon.data.documents import UNDECODABLE, Part, parts
from geon.errors import UsageError

_MOST_PARTS = 100_000
_MOST_BYTES = 1 << 34


@dataclass
class _Texts:
    """Documents in their order, and which of them are validation."""

    texts: list[bytes] = field(default_factory=list)
    is_val: list[bool] = field(default_factory=list)

    def of(self, val: bool) -> list[bytes]:
        """Those of a split."""
        return [text for text, is_val in zip(self.texts, self.is_val, strict=True) if is_val is val]


def text_corpus(
    path: str,
    val_percent: float,
    bpe_vocab: int = 0,
    codec: Codec | None = None,
    tokenizer: Codec | None = None,
    field: str = "text",
    skip_undecodable: bool = False,
) -> Corpus:
    """Any text, as bytes, by a tokenizer, or by a BPE trained on its training part.

    Documents are split by the hash of the file's name, those of JSON lines and tables by that of
    their text. Where that leaves one split empty, as of a single document, the text is cut: its
    last val_percent is validation.

    path: file or folder; see `data.documents.parts`.
    codec: what the ids of a checkpoint mean; None takes bytes, or trains a BPE.
    tokenizer: in place of both; its id of the end of text stands before each document.
    field: of JSON objects, and column of tables.

    Raises:
        UsageError: nothing at the path, not to be read, not UTF-8, too little text, no
            `tokenizers` for BPE, or a codec of another kind than bpe_vocab says.
    """
    if tokenizer is not None and bpe_vocab:
        raise UsageError(
            f"data.bpe_vocab {bpe_vocab} trains a tokenizer, and data.tokenizer "
            f"'{tokenizer.name}' is one: set one of them"
        )
    if codec is not None and isinstance(codec, ByteCodec) is not (bpe_vocab == 0):
        made = "bytes" if isinstance(codec, ByteCodec) else f"a BPE of {codec.vocab_size} ids"
        raise UsageError(
            f"data.bpe_vocab {bpe_vocab}, but the checkpoint reads its text by {made}: set "
            f"data.bpe_vocab={0 if made == 'bytes' else codec.vocab_size}, or "
            "checkpoint.resume=never"
        )
    found = _find(path, field)
    counts: Counter[str] = Counter()
    read = _read(path, found, val_percent, skip_undecodable, counts)
    both = read.of(False), read.of(True)
    if not all(both):
        both = _cut(read.texts, val_percent)
    join = joined if len(read.texts) > 1 else b"".join
    halves = join(both[0]), join(both[1])
    for half, what in zip(halves, ("training", "validation"), strict=True):
        if len(half) < 2:
            left = counts[UNDECODABLE]
            out = f" ({left} that are not UTF-8 were left out)" if left else ""
            raise UsageError(
                f"data.path '{path}' leaves {len(half)} bytes of {what} text with "
                f"data.val_percent {val_percent}{out}: give more text or another percentage"
            )
    if tokenizer is None or isinstance(tokenizer, ByteCodec):
        corpus = corpus_of(*halves, path, codec or tokenizer or _make_codec(halves[0], bpe_vocab))
    else:
        corpus = _tokenized(path, both, tokenizer)
    corpus.facts["files"] = len({part.path for part in found})
    if any(part.kind != "text" for part in found):
        corpus.facts["documents"] = len(read.texts)
    if skip_undecodable:
        corpus.facts[UNDECODABLE] = f"{counts[UNDECODABLE]} left out"
    return corpus


def whole_text(
    path: str,
    codec: Codec,
    field: str = "text",
    skip_undecodable: bool = False,
    begun: bool = False,
) -> Corpus:
    """All text at a path as validation, and none to train on.

    begun: the codec's id of the end of text stands before each document, as with data.tokenizer;
        otherwise a byte 0, as where bytes are read or a BPE was trained on the text.

    Raises:
        UsageError: as `text_corpus`.
    """
    counts: Counter[str] = Counter()
    texts = _read(path, _find(path, field), 0.0, skip_undecodable, counts).texts
    if begun and not isinstance(codec, ByteCodec):
        return _tokenized(path, ([], texts), codec)
    return corpus_of(b"", joined(texts) if len(texts) > 1 else b"".join(texts), path, codec)


def _find(path: str, field: str) -> list[Part]:
    """Parts of all that lies at a path."""
    if not path:
        raise UsageError("data.path is not set: data=text needs data.path=FILE_OR_FOLDER")
    root = Path(path).expanduser()
    with _named(path):
        if not root.exists():
            raise UsageError(f"data.path '{path}' does not exist (looked in {Path.cwd()})")
        found = parts([str(root)], field)
    if len(found) > _MOST_PARTS or sum(part.size for part in found) > _MOST_BYTES:
        raise _too_much(path)
    if field != "text" and all(part.kind == "text" for part in found):
        raise UsageError(
            f"data.field '{field}' has no effect: data.path '{path}' holds no JSON lines "
            "(.jsonl) and no table; leave it out"
        )
    return found


def _read(
    path: str, found: Sequence[Part], val_percent: float, skip: bool, counts: Counter[str]
) -> _Texts:
    root = Path(path).expanduser()
    read = _Texts()
    pieces: list[list[bytes]] = []
    size = 0

    for part in found:
        with _named(path):
            for text, _, follows in part.documents(skip, counts):
                raw = text.encode("utf-8")
                if (size := size + len(raw)) > _MOST_BYTES:
                    raise _too_much(path)
                if follows:
                    pieces[-1].append(raw)
                    continue
                name = str(Path(part.path).relative_to(root)) if part.kind == "text" else text
                read.is_val += split_by_name([name], val_percent)
                pieces.append([raw])
    read.texts = [whole[0] if len(whole) == 1 else b"".join(whole) for whole in pieces]
    return read


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Tell what is refused with the key."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"data.path '{path}': '{error.filename}' cannot be read: {error.strerror}"
        ) from None
    except UsageError as error:
        told = str(error)
        raise UsageError(told if "data.path" in told else f"data.path '{path}': {told}") from None


def _too_much(path: str) -> UsageError:
    return UsageError(
        f"data.path '{path}' holds more than {_MOST_PARTS:,} files or {_MOST_BYTES >> 30} GiB of "
        "text, which is kept in memory: make shards of it by `python -m geon.scripts.prepare_data "
        "tokenize`, for data=bins"
    )


def _make_codec(text: bytes, bpe_vocab: int) -> Codec:
    if not bpe_vocab:
        return ByteCodec()
    if bpe_vocab < 256:
        raise UsageError(f"data.bpe_vocab {bpe_vocab} is below the 256 bytes it starts from")
    try:
        from geon.data.bpe import train_bpe
    except ImportError:
        raise UsageError(
            "data.bpe_vocab needs the 'tokenizers' package: pip install 'geon[data]', "
            "or set data.bpe_vocab=0 to train on bytes"
        ) from None
    return train_bpe(text.decode("utf-8"), bpe_vocab)


def _cut(texts: Sequence[bytes], val_percent: float) -> tuple[list[bytes], list[bytes]]:
    """Cut texts near their end, within one of them."""
    total = sum(map(len, texts))
    left = total - int(total * val_percent / 100)
    for i, text in enumerate(texts):
        if left <= len(text):
            before, behind = _cut_at_character(text, left)
            return [*texts[:i], before], [behind, *texts[i + 1 :]]
        left -= len(text)
    return list(texts), []


def _cut_at_character(text: bytes, at: int) -> tuple[bytes, bytes]:
    """Cut near `at`, before a byte that starts a UTF-8 character."""
    while 0 < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return text[:at], text[at:]


def _tokenized(path: str, both: tuple[list[bytes], list[bytes]], codec: Codec) -> Corpus:
    """A corpus of training and validation documents, each behind the id that begins one."""
    kind = np.uint16 if codec.vocab_size <= 1 << 16 else np.uint32
    eot = [] if codec.eot is None else [codec.eot]
    digest = hashlib.sha256(codec.fingerprint.encode())
    splits = []
    for texts, what in zip(both, ("training", "validation"), strict=True):
        pieces = []
        for text in texts:
            pieces += [np.array(eot, kind), codec.encode(text.decode("utf-8")).astype(kind)]
            digest.update(len(text).to_bytes(8, "big") + text)
        digest.update(what.encode())
        whole = np.concatenate(pieces) if pieces else np.empty(0, kind)
        splits.append(Split(f"{what} text of {path}", [whole]))
    facts = {
        "name": path,
        "train_bytes": sum(map(len, both[0])),
        "val_bytes": sum(map(len, both[1])),
        "sha256": digest.hexdigest(),
        "tokenizer": codec.fingerprint[:12],  # a path would differ between hosts
    }
    if codec.token_bytes() is None:
        facts["no nats/byte"] = "this tokenizer does not give back exact bytes"
    return Corpus(*splits, codec.vocab_size, codec, b"".join(both[1]), facts)
