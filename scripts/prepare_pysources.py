"""The subcommand `pysources` of prepare_data: this machine's Python sources as shards of tokens."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geon.data import Codec, write_bin
from geon.data.corpus import SEPARATOR
from geon.data.meta import META, Meta, ShardFile, SplitMeta, TokenizerMeta, read_meta, write_meta
from geon.data.pysources import Sources, find_sources, roots
from geon.errors import UsageError
from geon.scripts.flags import whole

VOCAB = 16_384
VAL_PERCENT = 2
LEARNT = 24_000_000
"""Characters that the BPE is learnt from: 10 s on one core."""
SHARD = 100_000_000
"""Tokens of a shard, and a few more."""
AT_A_TIME = 1000
"""Files that are encoded together, on all cores."""
TOKENIZER = "tokenizer.json"


def add_pysources(subparsers: Any) -> None:
    """Add the subcommand to a command line."""
    parser = subparsers.add_parser(
        "pysources",
        help="the Python sources on this machine, by a BPE trained on them: no download",
        description="The standard library with its tests, and all installed packages; a file that "
        "is there twice, in another version too, counts once. Losses are comparable on one set of "
        "shards only. Train by data=bins data.dir=OUT.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--vocab", type=whole(512, 2**16), default=VOCAB, help=f"ids ({VOCAB:,})")
    parser.add_argument(
        "--most-mb", type=whole(1, 10**5), default=0, help="stop after so many MB of text (all)"
    )
    parser.set_defaults(run=run, kept="")


def run(args: argparse.Namespace) -> None:
    """Make the shards, unless they are there."""
    prepare(args.out, args.vocab, args.most_mb)


def prepare(out: Path, vocab: int = VOCAB, most_mb: int = 0) -> None:
    """Make the shards of a folder, unless it has a meta.json.

    A file is validation by the hash of its contents. The BPE is learnt from the training files.

    Raises:
        UsageError: no `tokenizers` package.
    """
    if not (out / META).exists():
        out.mkdir(parents=True, exist_ok=True)
        sources = find_sources(roots())
        print(f"{sources}", flush=True)
        _make(out, sources, vocab, most_mb * 10**6)
    splits = read_meta(out).splits
    told = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in splits.items())
    print(f"{out}: {told}", flush=True)


def _make(out: Path, sources: Sources, vocab: int, most: int) -> None:
    try:
        from geon.data.bpe import train_bpe
    except ImportError:
        raise UsageError("a BPE needs the 'tokenizers' package: pip install 'geon[data]'") from None
    texts = split(sources, most)
    learnt, size = [], 0
    for text in texts["train"]:
        learnt.append(text)
        size += len(text)
        if size >= LEARNT:
            break
    codec = train_bpe("".join(learnt), vocab)
    (out / TOKENIZER).write_text(codec.serialise(), encoding="utf-8")
    print(f"learnt {codec.vocab_size:,} ids from {size / 1e6:.0f} MB of it", flush=True)
    splits = {name: _write(out, name, found, codec) for name, found in texts.items()}
    fingerprint = hashlib.sha256(codec.serialise().encode()).hexdigest()
    tokenizer = TokenizerMeta(TOKENIZER, fingerprint, TOKENIZER)
    eot = int(codec.encode(SEPARATOR.decode())[0])
    write_meta(out, Meta("uint16", codec.vocab_size, eot, f"{sources}", tokenizer, splits))


def split(sources: Sources, most: int = 0) -> dict[str, list[str]]:
    """Texts by train and val, in the order of `sources`, until there are `most` bytes; 0: all."""
    texts: dict[str, list[str]] = {"train": [], "val": []}
    size = 0
    for path in sources.files:
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        # Its first bytes decide the order, so that the last ones are free to decide this.
        held_out = int.from_bytes(digest[-4:], "big") % 10_000 < 100 * VAL_PERCENT
        texts["val" if held_out else "train"].append(content.decode("utf-8"))
        size += len(content)
        if most and size >= most:
            break
    return texts


def _write(out: Path, name: str, texts: Sequence[str], codec: Codec) -> SplitMeta:
    """Write a split in shards; a separator stands before each text."""
    shards: list[ShardFile] = []
    ids: list[np.ndarray] = []
    held = tokens = size = 0

    def flush() -> None:
        nonlocal held
        file = f"pysources_{name}_{len(shards):06d}.bin"
        write_bin(out / file, np.concatenate(ids))
        digest = hashlib.sha256((out / file).read_bytes()).hexdigest()
        shards.append(ShardFile(file, held, digest))
        ids.clear()
        held = 0

    for start in range(0, len(texts), AT_A_TIME):
        some = texts[start : start + AT_A_TIME]
        found = codec.encode("".join(SEPARATOR.decode() + text for text in some))
        ids.append(found.astype(np.uint16))
        held += len(found)
        tokens += len(found)
        size += sum(len(text.encode()) for text in some) + len(some)
        if held >= SHARD:
            flush()
    if held:
        flush()
    return SplitMeta(tuple(shards), len(texts), size)
