"""Tokenizers of the `tokenizers` package, which this imports: import it lazily."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from geon.data.codec import Codec
from geon.data.fast import FastBPE
from geon.errors import UsageError

_PIECE = 1 << 16
"""Text is encoded in pieces of about this many characters: bounded memory."""
_SEAM = re.compile(r"[A-Za-z0-9](?= [A-Za-z])")
"""A letter or digit, then a space and a letter: where words are cut off with the space before
them, the pieces' ids are those of the whole."""
_WORDS = r"[^\r\n\p{L}\p{N}]?"
"""Stands in the regex of GPT-4, Llama 3, Qwen and others, whose words are cut so."""
END_OF_TEXT = "<|endoftext|>"
_EOTS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
EOS_KEY = "geon_eos"
"""Key in the serialised form, besides those of the package: a name for `eot` that a
tokenizer_config.json told and the tokenizer.json does not tell apart."""


def byte_of_symbol() -> dict[str, int]:
    """The byte that each symbol of the byte-level alphabet stands for.

    Printable bytes stand for themselves; the others, in order, take the symbols from U+0100 on
    (Radford et al., 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {chr(b): b for b in printable}
    return symbols | {chr(0x100 + i): b for i, b in enumerate(others)}


class BPECodec(Codec):
    """Any tokenizer of the package. A byte-level BPE gives back exact bytes; others, no lengths."""

    def __init__(self, serialised: str) -> None:
        """serialised: the text of a tokenizer.json.

        Raises:
            UsageError: one that draws its tokens.
            Exception: what the package makes of another text.
        """
        self._serialised = serialised
        content = json.loads(serialised)
        told = content.pop(EOS_KEY, None)
        self._tokenizer = Tokenizer.from_str(json.dumps(content) if told else serialised)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.fingerprint = hashlib.sha256(serialised.encode()).hexdigest()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if content["model"].get("dropout"):
            raise UsageError("the tokenizer has a dropout, so its ids are drawn: set it to null")
        self.eot = vocab[told] if told else end_of_text(content)
        self._bytes: list[bytes] | None = None
        self._seams = _cuts_words(content)
        if _is_byte_level(content):
            self._bytes = _bytes_of_ids(vocab, content["added_tokens"], self.vocab_size)
        self._fast = self._bytes and FastBPE.of(content, self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text."""
        pieces = list(_seams(text)) if self._bytes and self._seams else [text]
        if self._fast:
            ids = [self._fast.encode(piece) for piece in pieces]
        else:
            encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            ids = [np.asarray(e.ids, dtype=np.uint32) for e in encoded]
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Bytes of the tokens; special ones, and ids that padding added, have none."""
        own = [int(i) for i in ids if i < self.vocab_size]
        if self._bytes is None:
            return str(self._tokenizer.decode(own)).encode()
        return b"".join(self._bytes[i] for i in own)

    def token_bytes(self) -> np.ndarray | None:
        """Length of each token; None of a tokenizer that does not give back exact bytes."""
        if self._bytes is None:
            return None
        return np.array([len(b) for b in self._bytes], dtype=np.int64)

    def serialise(self) -> str:
        """The text of its tokenizer.json."""
        return self._serialised


def train_bpe(text: str, vocab_size: int) -> BPECodec:
    """Learn merges from a text; there is no token between documents.

    Cost: about 2 s for 9 MB and 1,000 tokens on one core.
    """
    return train_on(_pieces(text), vocab_size)


def train_on(texts: Iterator[str], vocab_size: int, special: Sequence[str] = ()) -> BPECodec:
    """Learn merges from texts. special: tokens without bytes, which take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPECodec(tokenizer.to_str())


def from_merges(vocab: str, merges: str) -> str:
    """Serialised tokenizer of GPT-2's two files, vocab.json and merges.txt.

    vocab, merges: their paths.
    """
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return str(tokenizer.to_str())


def end_of_text(content: dict[str, Any]) -> int | None:
    """The id that ends a text, by its name among the special tokens of a tokenizer.json."""
    special = {t["content"]: t["id"] for t in content["added_tokens"] if t["special"]}
    return next((special[name] for name in _EOTS if name in special), None)


def _cuts_words(content: dict[str, Any]) -> bool:
    """Whether words are cut off with the space before them, so that `_SEAM` changes no id."""
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if any(not token["special"] and " " in token["content"] for token in content["added_tokens"]):
        return False
    patterns = [step.get("pattern", {}).get("Regex", "") for step in steps]
    return bool(steps[-1].get("use_regex")) or any(_WORDS in pattern for pattern in patterns)


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether every text's tokens are its bytes: no normalizer, nothing put before or dropped."""
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    if content["model"]["type"] != "BPE" or content["normalizer"] or not steps[-1:]:
        return False
    if steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    splits = steps[:-1]
    kept = all(s["type"] in ("Split", "Digits", "Punctuation") for s in splits)
    kept = kept and all(s.get("behavior", "Isolated") != "Removed" for s in splits)
    added = [token for token in content["added_tokens"] if not token["special"]]
    return kept and not any(token["lstrip"] or token["rstrip"] for token in added)


def _bytes_of_ids(vocab: dict[str, int], added: list[Any], size: int) -> list[bytes] | None:
    """Bytes of each id; None where one of the 256 has no token, so that text could be lost."""
    symbols = byte_of_symbol()
    if any(symbol not in vocab for symbol in symbols):
        return None
    found = [b""] * size
    extra = {token["id"] for token in added}
    for token, i in vocab.items():
        if i not in extra and all(c in symbols for c in token):
            found[i] = bytes(symbols[c] for c in token)
    for token in added:
        found[token["id"]] = b"" if token["special"] else token["content"].encode()
    return found


def _pieces(text: str) -> Iterator[str]:
    """Cut after the first line end past every _PIECE characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE)
        stop = len(text) if stop < 0 else stop + 1
        yield text[start:stop]
        start = stop


def _seams(text: str) -> Iterator[str]:
    """Cut past every _PIECE characters, where that changes no id."""
    start = 0
    while start < len(text):
        seam = _SEAM.search(text, start + _PIECE)
        stop = seam.end() if seam else len(text)
        yield text[start:stop]
        start = stop


def standalone(codec: Codec) -> str:
    """Text of a tokenizer.json with the ids of a codec, which other programs read.

    Bytes become a byte-level BPE without merges. A byte-level BPE without a decoder gets one, so
    that ids come back as text.
    """
    if not isinstance(codec, BPECodec):
        vocab = byte_of_symbol()
        bytewise = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bytewise.decoder = decoders.ByteLevel()
        return str(bytewise.to_str())
    content = json.loads(codec.serialise())
    content.pop(EOS_KEY, None)
    if content.get("decoder") is None and _is_byte_level(content):
        content["decoder"] = json.loads(decoders.ByteLevel().__getstate__())
    return json.dumps(content, ensure_ascii=False)
