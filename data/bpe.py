"""A byte-level BPE trained on the run's own text. Imports `tokenizers`: import this lazily."""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from geon.data.codec import Codec

_PIECE = 1 << 16
"""Text is encoded in pieces of about this many characters, cut at line ends: bounded memory."""


def _byte_of_symbol() -> dict[str, int]:
    """The byte that each symbol of the byte-level alphabet stands for.

    Printable bytes stand for themselves; the others, in order, take the symbols from U+0100 on
    (Radford et al., 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {chr(b): b for b in printable}
    return symbols | {chr(0x100 + i): b for i, b in enumerate(others)}


class BPECodec(Codec):
    """Byte-level BPE: every text has tokens, and tokens concatenate to exact bytes."""

    def __init__(self, serialised: str) -> None:
        self._tokenizer = Tokenizer.from_str(serialised)
        self.vocab_size = self._tokenizer.get_vocab_size()
        symbols = _byte_of_symbol()
        self._bytes = [
            bytes(symbols[c] for c in self._tokenizer.id_to_token(i))
            for i in range(self.vocab_size)
        ]

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text."""
        encoded = self._tokenizer.encode_batch_fast(list(_pieces(text)), add_special_tokens=False)
        ids = [np.asarray(e.ids, dtype=np.uint32) for e in encoded]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of the tokens; ids that padding added to the vocabulary have none."""
        return b"".join(self._bytes[i] for i in ids if i < self.vocab_size)

    def token_bytes(self) -> np.ndarray:
        """Length of each token."""
        return np.array([len(b) for b in self._bytes], dtype=np.int64)

    def serialise(self) -> str:
        """The tokenizers library's JSON."""
        return self._tokenizer.to_str()


def train_bpe(text: str, vocab_size: int) -> BPECodec:
    """Learn merges from a text.

    Cost: about 2 s for 9 MB and 1,000 tokens on one core.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(text), trainer)
    return BPECodec(tokenizer.to_str())


def _pieces(text: str) -> Iterator[str]:
    """Cut after the first line end past every _PIECE characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE)
        stop = len(text) if stop < 0 else stop + 1
        yield text[start:stop]
        start = stop
