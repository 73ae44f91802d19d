"""The subcommand `pysources` of prepare_data: this machine's Python sources as shards of tokens."""

import argparse
import json
from pathlib import Path
from typing import Any

from geon.data.meta import META, read_meta
from geon.data.pysources import Sources, find_sources, roots
from geon.scripts.flags import whole

VOCAB = 16_384


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the shards, unless they are there."""
    prepare(args.out, args.vocab, args.most_mb)
    return 0


def prepare(out: Path, vocab: int = VOCAB, most_mb: int = 0) -> None:
    """Make the shards of a folder, unless it has a meta.json.

    Raises:
        UsageError: as tokenizing does.
    """
    if not (out / META).exists():
        from geon.scripts import prepare_data  # which imports this file

        sources = find_sources(roots())
        print(f"{sources}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        text = out / "sources.jsonl"
        kept = write_jsonl(text, sources, most_mb * 10**6)
        print(f"{kept:,} files of {text.stat().st_size / 1e6:.1f} MB are tokenized", flush=True)
        prepare_data.run(
            ["tokenize", str(text), f"--out={out}", f"--tokenizer=train:{vocab}", "--val-percent=2"]
        )
        text.unlink()
    splits = read_meta(out).splits
    told = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in splits.items())
    print(f"{out}: {told}", flush=True)


def write_jsonl(path: Path, sources: Sources, most: int = 0) -> int:
    """One file a line, in the order of `sources`, until there are `most` bytes; 0 takes all.

    Returns: files written.
    """
    taken = written = 0
    with path.open("w", encoding="utf-8") as file:
        for source in sources.files:
            text = source.read_bytes().decode("utf-8")
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            taken, written = taken + 1, written + len(text.encode())
            if most and written >= most:
                break
    return taken
