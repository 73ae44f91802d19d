"""Files of token ids as a corpus: by two globs, or a folder with a meta.json."""

import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geon.data import foreign
from geon.data.codec import Codec
from geon.data.corpus import Corpus, Split
from geon.data.meta import META, SPLITS, Meta, read_meta
from geon.data.shards import Shard, open_bin
from geon.data.stamps import check_ids
from geon.errors import UsageError

Found = Mapping[str, Sequence[Path]]
"""Files of each split, in the order in which they are read."""


def open_bins(train: str, val: str, vocab_size: int, folder: str = "", dtype: str = "") -> Corpus:
    """Open all files that two globs match, in the order of their names; or those of a folder.

    folder: has a meta.json, which names the files; then there are no globs.
    vocab_size: 0 takes that of a meta.json.
    dtype: of ids without a header where no meta.json says it.

    Raises:
        UsageError: a glob that matches nothing, a file matched twice, a bad file, an id outside of
            the vocabulary, or another tokenizer than the meta.json names.
    """
    if folder:
        home = Path(folder).expanduser()
        meta: Meta | None = _read_folder(home, folder)
        found: Found = {name: _listed(home, meta, name) for name in SPLITS}
        keys, why = dict.fromkeys(SPLITS, "data.dir"), ""
    else:
        keys = {"train": "data.train", "val": "data.val"}
        found = {"train": _matched(train, keys["train"]), "val": _matched(val, keys["val"])}
        home, meta, why = _beside(found)
    _check_distinct(found, keys)
    codec = None
    if meta is not None:
        vocab_size, said = meta.vocab_size, f"the vocab_size in '{home / META}'"
        dtype = dtype or meta.dtype
        codec, why = _codec(home, meta)
    else:
        said = "data.vocab_size"
    shards = {
        name: [open_bin(path, vocab_size, keys[name], dtype, said) for path in paths]
        for name, paths in found.items()
    }
    if not vocab_size:
        raise UsageError(
            "data.vocab_size=0 takes the vocabulary of a meta.json beside the shards, and there is "
            "none: set it, e.g. data.vocab_size=50304 for ids of GPT-2"
        )
    if folder:
        _check_counts(home, meta, shards)
    check_ids([shard for name in SPLITS for shard in shards[name]], vocab_size)
    digest = hashlib.sha256()
    for name in SPLITS:
        digest.update(f"data.{name}".encode())
        for shard in shards[name]:
            digest.update(shard.fingerprint().encode())
    named = {"train": folder or train, "val": folder or val}
    splits = {n: Split(f"{keys[n]} '{named[n]}'", shards[n]) for n in SPLITS}
    facts: dict[str, Any] = {
        "name": folder or train,
        "train_tokens": len(splits["train"]),
        "val_tokens": len(splits["val"]),
        "sha256": digest.hexdigest(),
    }
    if codec is not None:
        facts["tokenizer"] = codec.fingerprint
    elif why:
        facts["no text"] = why
    return Corpus(splits["train"], splits["val"], vocab_size, codec, b"", facts)


def _matched(pattern: str, key: str) -> list[Path]:
    """Files that a glob matches, in the order of their names."""
    paths = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser())))]  # noqa: PTH207
    if not pattern or not paths:
        other = "" if pattern else "; or data.dir=FOLDER, of a folder with a meta.json"
        raise UsageError(f"{key} '{pattern}' matches no file (looked in {Path.cwd()}){other}")
    return paths


def _check_distinct(found: Found, keys: Mapping[str, str]) -> None:
    """Refuse a file that is read twice under any name.

    Raises:
        UsageError: names both paths and their keys.
    """
    seen: dict[Path, tuple[Path, str]] = {}
    for name, paths in found.items():
        for path in paths:
            real = path.resolve()
            if real in seen:
                first, where = seen[real]
                raise UsageError(
                    f"'{path}' ({keys[name]}) is the same file as '{first}' ({where}): validation "
                    "must not read what is trained on, nor a split one file twice; narrow the globs"
                )
            seen[real] = path, keys[name]


def _read_folder(home: Path, told: str) -> Meta:
    """The meta.json of a folder; where there is none, what else may be done with what is there."""
    if not home.is_dir():
        what = "is a file, a folder is needed" if home.exists() else "does not exist"
        raise UsageError(f"data.dir '{told}' {what} (looked in {Path.cwd()})")
    if (home / META).is_file():
        return read_meta(home)
    raise UsageError(f"data.dir '{told}' has no {META}: {foreign.in_folder(home)}")


def _listed(home: Path, meta: Meta, name: str) -> list[Path]:
    """Files of a split that a meta.json names."""
    split = meta.splits.get(name)
    if split is None or not split.shards:
        words = "training" if name == "train" else "validation"
        raise UsageError(
            f"'{home / META}' has no {words} split (data.dir): make or fetch one, or name files "
            "by data.train and data.val"
        )
    for shard in split.shards:
        if not (home / shard.file).is_file():
            raise UsageError(
                f"'{home / shard.file}' is missing, and '{home / META}' names it (data.dir): run "
                "the command that made or fetched the shards again"
            )
    return [home / shard.file for shard in split.shards]


def _beside(found: Found) -> tuple[Path, Meta | None, str]:
    """The meta.json beside files of globs, if it names them all.

    Returns: their folder, what it says, and why it is not used if it is there.
    """
    homes = {path.parent for paths in found.values() for path in paths}
    home = next(iter(homes))
    if len(homes) > 1 or not (home / META).is_file():
        return home, None, ""
    try:
        meta = read_meta(home)
    except UsageError as error:
        return home, None, str(error)
    named = {shard.file for split in meta.splits.values() for shard in split.shards}
    if other := [p.name for paths in found.values() for p in paths if p.name not in named]:
        return home, None, f"'{home / META}' does not name '{other[0]}'"
    return home, meta, ""


def _check_counts(home: Path, meta: Meta | None, shards: Mapping[str, Sequence[Shard]]) -> None:
    """Hold the lengths of files against those that a meta.json says."""
    assert meta is not None
    for name, opened in shards.items():
        for said, shard in zip(meta.splits[name].shards, opened, strict=True):
            if len(shard) != said.tokens:
                raise UsageError(
                    f"'{shard.path}' holds {len(shard)} tokens, and '{home / META}' says "
                    f"{said.tokens}: make or fetch it again (data.dir)"
                )


def _codec(home: Path, meta: Meta) -> tuple[Codec | None, str]:
    """The tokenizer that a meta.json names; or why there is none.

    Raises:
        UsageError: it is not the one that made the shards.
    """
    known = meta.tokenizer
    if known is None:
        return None, f"'{home / META}' names no tokenizer"
    if known.file is None and known.name != "bytes":  # no rank asks a hub
        return None, f"the tokenizer {known.name} does not lie beside '{home / META}'"
    from geon.data.tokenizers import open_codec

    try:
        codec = open_codec(str(home / known.file) if known.file else known.name)
    except UsageError as error:
        return None, str(error)
    if known.fingerprint and codec.fingerprint != known.fingerprint:
        raise UsageError(
            f"the tokenizer {known.file or known.name} is not the one that made the shards: "
            f"'{home / META}' says fingerprint {known.fingerprint[:12]}, it has "
            f"{codec.fingerprint[:12]}: bring the right one, or make the shards again (data.dir)"
        )
    if codec.vocab_size < meta.vocab_size:
        raise UsageError(
            f"the tokenizer {known.file or known.name} has {codec.vocab_size} ids, and "
            f"'{home / META}' says vocab_size {meta.vocab_size} (data.dir)"
        )
    return codec, ""
