"""Text <-> token ids. A codec serialises to a string, which checkpoints carry."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from geon.errors import UsageError


class Codec(ABC):
    """A tokenizer.

    Attributes:
        vocab_size: ids are below this.
        eot: id that stands before each document, if there is one.
        name: what `data.tokenizers.open_codec` opened.
        fingerprint: SHA-256 of the serialised form.
    """

    vocab_size: int
    eot: int | None = None
    name: str = ""
    fingerprint: str = ""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text. Names of special tokens in it are text like any other."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of some token ids; exact for every sequence of ids where `token_bytes` is known."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray | None:
        """Length in bytes of each token (vocab_size,), special ones 0; None where it has none."""

    @abstractmethod
    def serialise(self) -> str:
        """What `load_codec` reads."""


class ByteCodec(Codec):
    """One token a byte of UTF-8."""

    vocab_size = 256
    eot = 0
    name = "bytes"
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Bytes of the text."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The ids themselves; ids that padding added to the vocabulary have no byte."""
        return bytes(int(i) for i in ids if i < 256)

    def token_bytes(self) -> np.ndarray:
        """One each."""
        return np.ones(256, dtype=np.int64)

    def serialise(self) -> str:
        """A word."""
        return "bytes"


def load_codec(serialised: str) -> Codec:
    """Codec from the string that `serialise` gave.

    Raises:
        UsageError: the `tokenizers` package is needed and missing.
    """
    if serialised == "bytes":
        return ByteCodec()
    try:
        from geon.data.bpe import BPECodec
    except ImportError:
        raise UsageError(
            "this text was tokenized by BPE, which needs the 'tokenizers' package: "
            "pip install 'geon[data]'; or read bytes with data.bpe_vocab=0"
        ) from None
    return BPECodec(serialised)
