"""meta.json: what the shards of a folder hold, and by which tokenizer."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geon.errors import UsageError

META = "meta.json"
FORMAT = 1
DTYPES = ("uint16", "uint32")
SPLITS = ("train", "val")
_MOST = 1 << 26
"""Bytes of a meta.json that are read at most: 100,000 shards take 15 MB."""


@dataclass(frozen=True)
class ShardFile:
    """One file of tokens. sha256: of the whole file; empty where it is not known."""

    file: str
    tokens: int
    sha256: str = ""


@dataclass(frozen=True)
class SplitMeta:
    """Files of a split, in the order in which they are read.

    Attributes:
        documents, bytes: of the text that the tokens stand for; None where not known.
    """

    shards: tuple[ShardFile, ...]
    documents: int | None = None
    bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all files."""
        return sum(shard.tokens for shard in self.shards)


@dataclass(frozen=True)
class TokenizerMeta:
    """The tokenizer that made the ids.

    Attributes:
        name: what `data.tokenizers.open_codec` takes, where there is no file.
        fingerprint: SHA-256 of its serialised form; empty where it is not known.
        file: its name beside the shards, if it lies there.
    """

    name: str
    fingerprint: str = ""
    file: str | None = None


@dataclass(frozen=True)
class Meta:
    """All that a meta.json says.

    Attributes:
        dtype: uint16 or uint32, of the ids in every file.
        vocab_size: all ids are below this.
        eot: id before each document, if there is one.
        source: where the text came from, for people.
        splits: by name: train, val.
    """

    dtype: str
    vocab_size: int
    eot: int | None
    source: str
    tokenizer: TokenizerMeta | None
    splits: Mapping[str, SplitMeta]


def write_meta(folder: Path, meta: Meta) -> Path:
    """Write meta.json into a folder, whole or not at all.

    Raises:
        OSError: as the system says.
    """
    splits = {
        name: {
            "tokens": split.tokens,
            "documents": split.documents,
            "bytes": split.bytes,
            "shards": [asdict(shard) for shard in split.shards],
        }
        for name, split in meta.splits.items()
    }
    content = {
        "format": FORMAT,
        "dtype": meta.dtype,
        "vocab_size": meta.vocab_size,
        "eot": meta.eot,
        "source": meta.source,
        "tokenizer": None if meta.tokenizer is None else asdict(meta.tokenizer),
        "splits": splits,
    }
    path, aside = folder / META, folder / f".{META}.{os.getpid()}"
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    return path


def read_meta(folder: Path) -> Meta:
    """Read the meta.json of a folder.

    Raises:
        UsageError: there is none, it is not to be read, or says what cannot be; names the field.
    """
    path = folder / META
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MOST))
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read: {error.strerror} (data.dir)") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"'{path}' is not JSON: make it again by the command that made the shards"
        ) from None
    return _Reader(path).meta(content)


class _Reader:
    """Fields of a meta.json, each checked where it is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def meta(self, content: Any) -> Meta:
        found = self._field(content, "format", int, "meta.json")
        if found != FORMAT:
            raise UsageError(
                f"'{self._path}' is of format {found}, expected {FORMAT}: it was made by another "
                "version of geon, make it again"
            )
        dtype = self._field(content, "dtype", str)
        if dtype not in DTYPES:
            raise self._wrong("dtype", dtype, " or ".join(DTYPES))
        vocab = self._field(content, "vocab_size", int)
        if not 0 < vocab <= 2**24:
            raise self._wrong("vocab_size", vocab, "1 to 2^24")
        eot = self._count(content, "eot", "eot")
        if eot is not None and eot >= vocab:
            raise self._wrong("eot", eot, f"an id below vocab_size {vocab}, or null")
        splits = self._field(content, "splits", dict)
        made = {name: self._split(name, splits[name]) for name in SPLITS if name in splits}
        self._check_distinct(made)
        return Meta(
            dtype=dtype,
            vocab_size=vocab,
            eot=eot,
            source=self._field(content, "source", str),
            tokenizer=self._tokenizer(content.get("tokenizer")),
            splits=made,
        )

    def _split(self, name: str, content: Any) -> SplitMeta:
        place = f"splits.{name}"
        rows = self._field(content, "shards", list, place)
        shards = []
        for i, row in enumerate(rows):
            where = f"{place}.shards[{i}]"
            file = self._name(self._field(row, "file", str, where), f"{where}.file")
            tokens = self._count(row, "tokens", f"{where}.tokens")
            if tokens is None:
                raise self._wrong(f"{where}.tokens", tokens, "a number of tokens")
            shards.append(ShardFile(file, tokens, self._field(row, "sha256", str, where)))
        split = SplitMeta(
            tuple(shards),
            documents=self._count(content, "documents", f"{place}.documents"),
            bytes=self._count(content, "bytes", f"{place}.bytes"),
        )
        if content.get("tokens") != split.tokens:
            told = f"{split.tokens}, the sum over its shards"
            raise self._wrong(f"{place}.tokens", content.get("tokens"), told)
        return split

    def _tokenizer(self, content: Any) -> TokenizerMeta | None:
        if content is None:
            return None
        name = self._field(content, "name", str, "tokenizer")
        file = content.get("file")
        if file is not None:
            file = self._name(file, "tokenizer.file")
        return TokenizerMeta(name, self._field(content, "fingerprint", str, "tokenizer"), file)

    def _name(self, name: Any, place: str) -> str:
        """A file's name: what lies elsewhere is not what this folder's meta.json is about."""
        plain = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
        if not plain or "/" in name or "\\" in name:
            raise self._wrong(place, name, "the name of a file beside it")
        return name

    def _count(self, content: Any, key: str, place: str) -> int | None:
        value = content.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise self._wrong(place, value, "a whole number, or null")
        return value

    def _field(self, content: Any, key: str, kind: type, place: str = "") -> Any:
        dotted = f"{place}.{key}".lstrip(".")
        if not isinstance(content, dict):
            raise self._wrong(place, content, "an object")
        if type(content.get(key)) is not kind:
            raise self._wrong(dotted, content.get(key), f"a value of type {kind.__name__}")
        return content[key]

    def _check_distinct(self, splits: Mapping[str, SplitMeta]) -> None:
        seen: set[str] = set()
        for name, split in splits.items():
            for shard in split.shards:
                if shard.file in seen:
                    raise self._wrong(f"splits.{name}", shard.file, "each file once")
                seen.add(shard.file)

    def _wrong(self, place: str, value: Any, expected: str) -> UsageError:
        told = json.dumps(value, default=str)[:80]
        return UsageError(f"'{self._path}': {place} is {told}, expected {expected} (data.dir)")
