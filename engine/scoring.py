"""The loss of a checkpoint on the run's validation text, or on any other."""

from dataclasses import replace
from pathlib import Path

from geon.configs.schema import Config, Layouts
from geon.data import Codec, Corpus, Split
from geon.data.meta import META, read_meta
from geon.data.shards import open_bin
from geon.data.text import whole_text
from geon.engine import build
from geon.engine.devices import pick_device
from geon.engine.evaluate import Evaluation, evaluate
from geon.engine.parallel import Parallel
from geon.engine.saved import Saved
from geon.engine.sources import with_validation
from geon.errors import UsageError
from geon.launch.env import Env

_IDS = (".bin", ".npy")
"""Endings of files of token ids; all else is text."""


def validation(config: Config, saved: Saved) -> Corpus:
    """What the run itself validates on.

    Raises:
        UsageError: it cannot be read any more, or is other text than it was.
    """
    codec = saved.codec.serialise() if saved.codec else None
    corpus = with_validation(config, build.make_corpus(config.data, config.seed, codec))
    was, now = (saved.facts.get("data") or {}).get("sha256"), corpus.facts.get("sha256")
    if was and now != was:
        raise UsageError(
            f"data={config.data.source.value} is other data than '{saved.path}' was trained on "
            f"(sha256 {str(now)[:12]}, then {was[:12]}): give what to evaluate by --data"
        )
    return corpus


def anything(path: Path, config: Config, saved: Saved) -> Corpus:
    """All that lies at a path, as validation; of a folder with a meta.json, its validation split.

    Files .bin and .npy hold ids, other files text. Ids are taken to be the run's own.

    Raises:
        UsageError: nothing there, not to be read, or ids of another tokenizer.
    """
    home = path.expanduser()
    if (home / META).is_file() or home.suffix in _IDS:
        return _ids(home, config, saved)
    if saved.codec is None:
        raise UsageError(
            f"--data '{path}': '{saved.path}' holds no tokenizer, because it was trained on ids "
            "whose text is not known; give a shard (.bin)"
        )
    data = config.data
    begun = bool(data.tokenizer) or data.source.value in ("bins", "stream")
    return whole_text(str(path), saved.codec, data.field, data.skip_undecodable, begun)


def _ids(path: Path, config: Config, saved: Saved) -> Corpus:
    vocab, codec = config.model.vocab_size, saved.codec
    files, dtype = [path], config.data.dtype
    if (path / META).is_file():
        meta = read_meta(path)
        split = meta.splits.get("val")
        if split is None or not split.shards:
            raise UsageError(f"'{path / META}' has no validation split: name a shard by --data")
        _check_tokenizer(path, codec, meta.tokenizer.fingerprint if meta.tokenizer else "")
        files, dtype = [path / shard.file for shard in split.shards], meta.dtype
    shards = [open_bin(file, vocab, "--data", dtype, "model.vocab_size") for file in files]
    name = str(path)
    splits = Split(f"--data '{name}', training", []), Split(f"--data '{name}'", shards)
    return Corpus(*splits, vocab, codec, b"", {"name": name})


def _check_tokenizer(path: Path, codec: Codec | None, fingerprint: str) -> None:
    if codec is not None and fingerprint and codec.fingerprint != fingerprint:
        raise UsageError(
            f"--data '{path}': its ids are of another tokenizer ({fingerprint[:12]}) than the "
            f"checkpoint's ({codec.fingerprint[:12]}), so they mean other text"
        )


def score(
    config: Config, saved: Saved, corpus: Corpus, val_tokens: int, batch: int, device: str
) -> Evaluation:
    """Evaluate on one process, by the trainer's own validation and in the run's precision.

    val_tokens: evaluated at most; 0 takes all. batch: windows in one forward pass.

    Raises:
        UsageError: less than one window of the model's context.
    """
    alone = replace(
        config.parallel, layout=Layouts.single, replicas=1, tensor=1, compile=False, loss_chunks=1
    )
    parallel = Parallel(alone, Env(), pick_device(device, 0))
    parallel.wrap(saved.model)
    found = evaluate(parallel, corpus, config.model.context, val_tokens, batch)
    assert found is not None  # nobody asks it to stop
    return found
