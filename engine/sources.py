"""Sources that are made of others, or have no end: mixtures and streams, from their config."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from geon.configs.schema import Config, DataConfig
from geon.data import (
    Batches,
    Corpus,
    ImageBatches,
    ImageSplit,
    MixedBatches,
    Split,
    StreamBatches,
    mixed_corpus,
)
from geon.data.codec import Codec
from geon.data.hf import Where, identify, open_dataset
from geon.data.stream import Recipe, validation
from geon.engine.loggers import say
from geon.errors import UsageError


def mixture(config: DataConfig, make: Callable[[DataConfig], Corpus]) -> Corpus:
    """Open the sources of data=mix, each as if it were alone.

    make: opens one.

    Raises:
        UsageError: no source, or one that is refused; names it.
    """
    if not config.mix:
        raise UsageError(
            "data.mix is empty: data=mix needs 'data.mix={NAME: {weight: 0.7, source: stdlib}, "
            "OTHER: {weight: 0.3, source: text, path: FOLDER}}'"
        )
    parts = {}
    for name, part in config.parts().items():
        try:
            parts[name] = make(part)
        except UsageError as error:
            raise UsageError(f"data.mix.{name}: {error}") from None
    return mixed_corpus(parts, {name: entry.weight for name, entry in config.mix.items()})


def stream(config: DataConfig, codec: Codec) -> Corpus:
    """Open data=stream: what it is, and none of its documents.

    Raises:
        UsageError: no such dataset, split or column, or nothing that says what is validated on.
    """
    if not config.dataset:
        raise UsageError(
            "data.dataset is not set: data=stream needs data.dataset=NAME_OR_FOLDER, a Hugging "
            "Face dataset or local .jsonl, .json, .parquet or .txt"
        )
    if not config.val_split and not config.val_tokens:
        raise UsageError(
            "data.val_tokens 0 would read the whole dataset for what is held out of it: set "
            "data.val_tokens, or data.val_split"
        )
    if config.val_split and config.val_split == config.split:
        raise UsageError(
            f"data.val_split '{config.val_split}' is what is trained on (data.split): choose "
            "another, or leave it out to hold documents out"
        )
    where = Where(config.dataset, config.subset, config.split, config.field, config.revision)
    known = identify(where)
    where = replace(where, revision=known.get("revision", ""))
    shards = open_dataset(where).num_shards
    by_file = shards % config.streams == 0
    identity = [known["fingerprint"], where.subset, where.split, where.field, codec.fingerprint]
    return Corpus(
        train=Split(f"data.dataset '{config.dataset}'", []),
        val=Split(f"validation documents of data.dataset '{config.dataset}'", []),
        vocab_size=codec.vocab_size,
        codec=codec,
        val_text=b"",
        facts={
            "name": config.dataset,
            **({"subset": where.subset} if where.subset else {}),
            "split": where.split,
            **{key: value for key, value in known.items() if key != "fingerprint"},
            "shards": shards,
            "streams": config.streams,
            "read": "each stream has shards of its own"
            if by_file
            else "each stream reads all shards, and keeps its documents: fewer bytes are read "
            f"where data.streams divides {shards}",
            "tokenizer": codec.name,
            "sha256": hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        },
        stream=where,
    )


def with_validation(config: Config, corpus: Corpus) -> Corpus:
    """Read what a stream is validated on, into memory; another corpus is as it was.

    Raises:
        UsageError: too little of it.
    """
    if corpus.stream is None:
        return corpus
    assert corpus.codec is not None
    data, where, held = config.data, corpus.stream, _held(config.data)
    if data.val_split:
        where, held = replace(where, split=data.val_split), 10_000
    tokens = validation(where, corpus.codec, held, data.val_tokens)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    facts = {**corpus.facts, "val_tokens": len(tokens)}
    facts["sha256"] = hashlib.sha256(f"{facts['sha256']} {digest}".encode()).hexdigest()
    return replace(corpus, val=Split(corpus.val.name, [tokens]), facts=facts)


def _held(config: DataConfig) -> int:
    """Share of 10,000 documents that are not trained on."""
    return 0 if config.val_split else max(1, round(config.val_percent * 100))


def batches(config: Config, corpus: Corpus, common: dict[str, Any], main: bool) -> Batches:
    """Batches of any source.

    common: arguments of `Batches`. main: whether this rank speaks for all.

    Raises:
        UsageError: as the batches do.
    """
    if corpus.parts:
        weights = tuple((name, float(entry.weight)) for name, entry in config.data.mix.items())
        parts = tuple((name, part.train) for name, part in corpus.parts.items())
        return MixedBatches(**common, parts=parts, weights=weights)
    if isinstance(corpus.train, ImageSplit):
        return ImageBatches(**common)
    if corpus.stream is None:
        return Batches(**common)
    assert corpus.codec is not None
    data = config.data
    recipe = Recipe(
        corpus.stream,
        corpus.codec.serialise(),
        data.streams,
        config.model.context,
        config.seed,
        data.shuffle,
        data.buffer,
        _held(data),
    )
    speaker = say if main else None
    return StreamBatches(**common, recipe=recipe, workers=data.workers, say=speaker)
