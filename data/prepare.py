"""Text to shards: documents are read in order, encoded by processes, and written in order."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from geon.data.codec import Codec
from geon.data.documents import UNDECODABLE, Document, Part
from geon.data.encode import Piece, encoded
from geon.data.meta import SPLITS, Meta, TokenizerMeta, write_meta
from geon.data.stream import held_out
from geon.data.tokenizers import FILE, open_codec
from geon.data.writer import ANEW, JOURNAL, Journal, SplitWriter, clear, holds, read_journal
from geon.errors import UsageError

BATCH = 1 << 20
"""Characters that a process encodes at a time, at least."""
LEARN = 1 << 26
"""Characters of the training text that a tokenizer is trained on, about."""
_BLOCK = 1 << 14
"""Where all text is one file, it is cut in blocks of about so many characters at most."""
_EVERY = 3.0
"""Seconds between two notes of the journal."""


@dataclass(frozen=True)
class Job:
    """What is made of what; the shards depend on this alone.

    Attributes:
        parts: of the sources, in order.
        source: their names, for people.
        tokenizer: a name for `open_codec`, or train:SIZE.
        val_percent: share of the documents, by the hash of their text.
        shard_tokens: tokens of each shard but the last.
        dtype: uint16, uint32, or '' for the smaller that holds the ids.
        skip_undecodable: leave out what is not UTF-8.
    """

    parts: Sequence[Part]
    source: str
    tokenizer: str
    val_percent: float
    shard_tokens: int
    dtype: str = ""
    skip_undecodable: bool = False

    @property
    def held(self) -> int:
        """Of 10,000 documents, those that validate."""
        return max(1, round(100 * self.val_percent))

    @property
    def lone(self) -> bool:
        """Whether all text is one text file: blocks of it validate, evenly over the file."""
        kinds, paths = {part.kind for part in self.parts}, {part.path for part in self.parts}
        return kinds == {"text"} and len(paths) == 1

    @property
    def block(self) -> int:
        """Characters of those blocks: at least four of them validate, but in tiny files."""
        size = sum(part.size for part in self.parts)
        return min(_BLOCK, max(64, size * self.held // 40_000))


@dataclass
class Place:
    """Where the reading goes on.

    Attributes:
        part, documents: the part, and how many of its documents lie behind.
        val: split of the document before.
        skipped, skipped_before: left out of this part, and of those before.
        read: characters that lie behind.
    """

    part: int = 0
    documents: int = 0
    val: bool | None = None
    skipped: int = 0
    skipped_before: int = 0
    read: int = 0


@dataclass(frozen=True)
class Done:
    """What was made.

    Attributes:
        cpu: seconds of encoding, over all processes, of `encoded` bytes.
        exact: whether the tokenizer gives back exact bytes.
        already: an earlier call made it.
    """

    meta: Meta
    skipped: int
    encoded: int
    cpu: float
    exact: bool
    already: bool = False


def tokenize(
    job: Job,
    folder: Path,
    workers: int,
    resume: bool = True,
    told: Callable[[int], None] = lambda done: None,
    said: Callable[[str], None] = lambda line: None,
) -> Done:
    """Make shards and their meta.json in a folder, or go on with what an earlier call left.

    workers: processes that encode; 1 encodes in this one. The shards do not depend on it.
    resume: go on with what is there; else it is removed.
    told: hears how many characters of text have been read. said: hears lines for people.

    Raises:
        UsageError: bad sources, a tokenizer that cannot be had, a folder of something else.
        OSError: the disk is full, or as the system says.
    """
    key = _key(job)
    codec = None if job.tokenizer.startswith("train:") else open_codec(job.tokenizer)
    if codec is not None:
        key["fingerprint"] = codec.fingerprint
    journal = _begun(folder, key, resume)
    codec = codec or _trained(job, folder, journal, said)
    file, dtype = _keep(codec, folder), _dtype(job.dtype, codec)
    codec.name = job.tokenizer
    if not journal.done and journal.place["read"]:
        said(f"going on after {journal.place['read'] / 1e6:.1f} MB that are done")
    done, cpu, size_done = journal.done, 0.0, 0
    writers = {
        name: SplitWriter(folder, name, dtype, job.shard_tokens, journal.splits.get(name, {}))
        for name in SPLITS
    }
    place = Place(**journal.place)
    try:
        if not done:
            last = time.monotonic()
            for found, there in encoded(_batches(job, place), codec, workers):
                place = there
                for name, (ids, documents, size) in found.splits.items():
                    writers[name].add(ids)
                    writers[name].documents += documents
                    writers[name].bytes += size
                    size_done += size
                cpu += found.cpu
                told(place.read)
                if time.monotonic() - last > _EVERY:
                    _note(journal, folder, writers, place)
                    last = time.monotonic()
            _check_filled(writers, job)
            _note(journal, folder, writers, place)
            for writer in writers.values():
                writer.finish()
        meta = Meta(
            dtype,
            codec.vocab_size,
            codec.eot,
            job.source,
            TokenizerMeta(codec.name, codec.fingerprint, file),
            {name: writer.meta() for name, writer in writers.items()},
        )
        if not done:
            write_meta(folder, meta)
            journal.done = True
            _note(journal, folder, writers, place)
    finally:
        for writer in writers.values():
            writer.close()
    skipped, exact = place.skipped_before + place.skipped, codec.token_bytes() is not None
    return Done(meta, skipped, size_done, cpu, exact, already=done)


def _note(journal: Journal, folder: Path, writers: dict[str, SplitWriter], place: Place) -> None:
    for writer in writers.values():
        writer.sync()
    journal.place = asdict(place)
    journal.splits = {name: writer.state() for name, writer in writers.items()}
    journal.write(folder)


def _begun(folder: Path, key: dict[str, Any], resume: bool) -> Journal:
    """The journal of what an earlier call began, else a new one: what has none is not removed."""
    if not resume and (folder / JOURNAL).exists():
        clear(folder)
    journal = read_journal(folder)
    if journal is None:
        if name := holds(folder):
            raise UsageError(f"'{folder}' holds a {name} of something else: choose another --out")
        journal = Journal(key, asdict(Place()), {})
        journal.write(folder)
    old = journal.key
    if changed := [word for word in key if old.get(word) != key[word]]:
        told = ", ".join(
            "other text: sources, or their sizes or times, have changed"
            if w == "files"
            else f"{w} was {old.get(w)!r} and is {key[w]!r}"
            for w in changed
        )
        raise UsageError(
            f"'{folder}' holds what another command began ({told[:400]}): give that one again, "
            "choose another --out, or remove it by --resume never"
        )
    return journal


def _key(job: Job) -> dict[str, Any]:
    """All that the shards depend on."""
    digest = hashlib.sha256()
    for part in job.parts:
        path = Path(part.path)
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        if path.exists():  # the same file, from whatever folder it is named
            part = replace(part, path=str(path.resolve()))
        digest.update(f"{part} {changed}\n".encode(errors="surrogateescape"))
    return {
        "files": digest.hexdigest()[:16],
        "tokenizer": job.tokenizer,
        "val_percent": job.val_percent,
        "shard_tokens": job.shard_tokens,
        "dtype": job.dtype,
        "skip_undecodable": job.skip_undecodable,
    }


def _trained(job: Job, folder: Path, journal: Journal, said: Callable[[str], None]) -> Codec:
    """The tokenizer that is trained on the text: once, then it lies beside the shards."""
    path = folder / FILE
    if not path.is_file():
        said(f"training a tokenizer of {job.tokenizer[6:]} ids")
        _write(path, _learn(job, int(job.tokenizer[6:])).serialise())
    codec = open_codec(str(path))
    if journal.key.setdefault("fingerprint", codec.fingerprint) != codec.fingerprint:
        raise UsageError(f"'{path}' has changed since it was trained: {ANEW}")
    return codec


def _keep(codec: Codec, folder: Path) -> str | None:
    """Keep a tokenizer beside its shards; the bytes need no file."""
    if codec.serialise() == "bytes":
        return None
    path = folder / FILE
    if not (path.is_file() and path.read_text("utf-8") == codec.serialise()):
        _write(path, codec.serialise())
    return FILE


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8", newline="")
    aside.replace(path)


def _learn(job: Job, size: int) -> Codec:
    """Train a BPE on the training documents: on so much of each part as is its share."""
    try:
        from geon.data.bpe import END_OF_TEXT, train_on
    except ImportError:
        raise UsageError(
            "--tokenizer train:SIZE needs the 'tokenizers' package: pip install 'geon[data]'"
        ) from None

    def texts() -> Iterator[str]:
        total = sum(part.size for part in job.parts)
        first = False  # split of the file's first text
        for number, part in enumerate(job.parts):
            left = max(1 << 16, LEARN * part.size // total if total else LEARN)
            begin = Place(number, val=first if part.start else None)
            for piece, there in _pieces(job, begin):
                if there.part != number:
                    break
                if there.documents == 1 and not part.start:
                    first = piece.val
                if not piece.val:
                    yield piece.text
                    left -= len(piece.text)
                if left <= 0:
                    break

    return train_on(texts(), size, [END_OF_TEXT])


def _dtype(wanted: str, codec: Codec) -> str:
    least = "uint16" if codec.vocab_size <= 1 << 16 else "uint32"
    if wanted == "uint16" and least != wanted:
        raise UsageError(
            f"--dtype uint16 holds 65,536 ids, the tokenizer has {codec.vocab_size}: take uint32"
        )
    return wanted or least


def _check_filled(writers: dict[str, SplitWriter], job: Job) -> None:
    for name, writer in writers.items():
        if not writer.bytes:
            documents = sum(one.documents for one in writers.values())
            if not any(one.bytes for one in writers.values()):
                raise UsageError(f"{job.source} holds no text: choose other sources")
            if documents == 1:
                raise UsageError(
                    f"{job.source} holds one document of {sum(w.bytes for w in writers.values())} "
                    "bytes, too short for a part of it to validate: give more text, with --resume "
                    "never"
                )
            # Three times the expected share of one document, and more than what was asked for.
            likely = min(50, max(math.ceil(300 / documents), math.ceil(2 * job.val_percent)))
            raise UsageError(
                f"none of {documents} documents of {job.source} fell to "
                f"{'training' if name == 'train' else 'validation'} with --val-percent "
                f"{job.val_percent}: give more documents, or another percentage, e.g. {likely}, "
                "with --resume never"
            )


def _pieces(job: Job, place: Place) -> Iterator[tuple[Piece, Place]]:
    """Text with its split, each with the place behind it."""
    for number in range(place.part, len(job.parts)):
        counts: Counter[str] = Counter()
        documents = job.parts[number].documents(job.skip_undecodable, counts)
        if job.lone:
            documents = _blocks(documents, job.block)
        behind = place.documents
        for at, one in enumerate(documents, start=1):
            if at <= behind:
                continue
            goes_on = one.follows and place.val is not None
            val = place.val if goes_on else held_out(one.text, job.held)
            if job.lone:  # evenly
                val = at * job.held // 10_000 > (at - 1) * job.held // 10_000
            assert val is not None
            piece = Piece(one.text, val, not (goes_on and val is place.val))
            skipped = counts[UNDECODABLE]
            read = place.read + len(one.text)
            place = replace(place, part=number, documents=at, val=val, skipped=skipped, read=read)
            yield piece, place
        before = place.skipped_before + counts[UNDECODABLE]
        place = Place(number + 1, 0, place.val, 0, before, place.read)


def _blocks(documents: Iterator[Document], size: int) -> Iterator[Document]:
    """Cut documents behind line ends, into blocks of `size` characters or a line more.

    A line that is longer than four blocks is cut behind a space, else anywhere.
    """
    for one in documents:
        start, follows = 0, one.follows
        while start < len(one.text):
            most = start + 5 * size
            end = one.text.find("\n", start + size) + 1 or len(one.text)
            if end > most:
                end = one.text.find(" ", start + size, most) + 1 or start + size
            yield Document(one.text[start:end], one.where, follows)
            start, follows = end, True


def _batches(job: Job, place: Place) -> Iterator[tuple[list[Piece], Place]]:
    batch: list[Piece] = []
    size = 0
    behind = place
    for piece, behind in _pieces(job, place):
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= 1 << 14:
            yield batch, behind
            batch, size = [], 0
    yield batch, behind
