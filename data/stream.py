"""Documents without an end as windows of tokens: shuffled in blocks, packed, resumed by a place.

A dataset is read in a fixed number of disjoint parts, whatever the number of ranks. Each part has
its own place, which says all that its next windows depend on.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from geon.data.codec import load_codec
from geon.data.hf import Documents, Reading, Where, open_dataset
from geon.data.order import permute
from geon.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """How windows are made of a dataset: all that they depend on but the place.

    Attributes:
        where: the dataset.
        codec: serialised tokenizer.
        parts: disjoint parts that it is read in.
        context: window length T; a window is T + 1 tokens, and the next begins with its last.
        seed, shuffle: order of files and documents; without shuffle, the dataset's own.
        buffer: documents of a part that are shuffled together.
        held: documents whose hash is below this of 10,000 are for validation, and left out.
    """

    where: Where
    codec: str
    parts: int
    context: int
    seed: int
    shuffle: bool
    buffer: int
    held: int


@dataclass
class Place:
    """Where a part stands, for JSON; documents are read and tokenized again from here.

    Attributes:
        epoch: how often the part has been read to its end.
        block: number of the block of documents within the epoch.
        source: the dataset's state before that block; None at the beginning of an epoch.
        used: documents of the block that lie behind.
        rest: tokens carried into the next document.
        cut: windows of that document, with the rest before it, that lie behind.
    """

    epoch: int = 0
    block: int = 0
    source: dict[str, Any] | None = None
    used: int = 0
    rest: list[int] = field(default_factory=list)
    cut: int = 0


def held_out(text: str, held: int) -> bool:
    """Whether a document is for validation: by the hash of its text, wherever it lies."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10_000 < held


class Stream:
    """Windows of one part, without an end: when its documents are read, a new epoch begins."""

    def __init__(
        self, recipe: Recipe, part: int, opened: Any, place: Mapping[str, Any] | None = None
    ) -> None:
        """opened: what `open_dataset` gave. place: where to go on; None begins."""
        self._recipe, self._part = recipe, part
        self._codec = load_codec(recipe.codec)
        self._documents = Documents(opened, recipe.where, part, recipe.parts)
        self._at = Place(**place) if place else Place()
        self._rest = np.array(self._at.rest, np.int32)
        self._reading: Reading | None = None
        self._block: list[str] | None = None
        self._after: dict[str, Any] | None = None
        self._tokens: np.ndarray | None = None
        """The rest and the tokens of a document: windows are cut off here."""
        if self._at.cut:
            self._next_document(keep=self._at.cut)

    @property
    def epoch(self) -> int:
        """How often the part has been read to its end."""
        return self._at.epoch

    def place(self) -> dict[str, Any]:
        """Where the next window comes from."""
        return {**asdict(self._at), "rest": self._rest.tolist()}

    def windows(self, count: int) -> np.ndarray:
        """The next windows: (count, T + 1) int32.

        Raises:
            UsageError: an epoch without documents, or rows without text.
        """
        length = self._recipe.context
        rows = np.empty((count, length + 1), np.int32)
        done = 0
        while done < count:
            if self._tokens is None:
                self._next_document()
                assert self._tokens is not None
            whole = max(0, len(self._tokens) - 1) // length
            for cut in range(self._at.cut, min(whole, self._at.cut + count - done)):
                rows[done] = self._tokens[cut * length : (cut + 1) * length + 1]
                done, self._at.cut = done + 1, cut + 1
            if self._at.cut == whole:
                self._rest = self._tokens[whole * length :].copy()
                self._at.used, self._at.cut, self._tokens = self._at.used + 1, 0, None
        return rows

    def _next_document(self, keep: int = 0) -> None:
        """Tokenize the next document behind the rest. keep: windows of it that lie behind."""
        if self._block is None:
            self._read_block()
        while self._at.used >= len(self._block or ()):
            self._at.block, self._at.used, self._at.source = self._at.block + 1, 0, self._after
            self._read_block()
        assert self._block is not None
        ids = self._codec.encode(self._block[self._at.used]).astype(np.int32)
        eot = [] if self._codec.eot is None else [self._codec.eot]
        self._tokens = np.concatenate([self._rest, np.array(eot, np.int32), ids])
        self._at.cut = keep

    def _read_block(self) -> None:
        """Read the block that the place names, or begin a new epoch where there is none."""
        recipe = self._recipe
        size = recipe.buffer if recipe.shuffle else 1
        for _ in range(2):
            if self._reading is None:
                order = self._key("files", self._at.epoch) % 2**31 if recipe.shuffle else 0
                self._reading = self._documents.begin(order, self._at.source)
            block: list[str] = []
            for text in self._reading:
                if not held_out(text, recipe.held):
                    block.append(text)
                    if len(block) == size:
                        break
            if block:
                break
            if self._at.block == 0:
                raise self._empty()
            self._at = Place(epoch=self._at.epoch + 1)
            self._reading = None
        else:
            raise self._empty()
        self._after = self._reading.state()
        if recipe.shuffle:
            key = self._key("block", self._part, self._at.epoch, self._at.block)
            block = [block[i] for i in permute(np.arange(len(block)), len(block), key)]
        self._block = block

    def _key(self, *words: Any) -> int:
        text = "/".join(map(str, (self._recipe.seed, *words)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "big")

    def _empty(self) -> UsageError:
        where, parts = self._recipe.where, self._recipe.parts
        return UsageError(
            f"data.dataset '{where.dataset}', split '{where.split}': part {self._part} of "
            f"data.streams {parts} has no document to train on; give more documents, or lower "
            "data.streams"
        )


def validation(
    where: Where, codec: Any, held: int, tokens: int, opened: Any | None = None
) -> np.ndarray:
    """Tokens of the documents that are validated on, in the dataset's order.

    held: share of 10,000 that is held out of a training split; 10,000 takes all documents.
    tokens: how many are wanted, and one more; 0 takes all.

    Cost: reads the dataset from its begin until there are enough.
    """
    reading = Documents(opened or open_dataset(where), where, 0, 1).begin(0)
    pieces: list[np.ndarray] = []
    count = 0
    for text in reading:
        if tokens and count > tokens:
            break
        if held_out(text, held):
            eot = [] if codec.eot is None else [codec.eot]
            pieces.append(np.concatenate([np.array(eot, np.uint32), codec.encode(text)]))
            count += len(pieces[-1])
    found = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
    return found[: tokens + 1].astype(np.uint32) if tokens else found.astype(np.uint32)
