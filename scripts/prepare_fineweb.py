"""The subcommand `fineweb10b` of prepare_data: public shards, fetched, verified and described."""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geon.data.download import Remote, fetch_all, locked, missing
from geon.data.hub import PUBLIC, list_files
from geon.data.meta import Meta, ShardFile, SplitMeta, TokenizerMeta, write_meta
from geon.data.shards import Shard, open_bin
from geon.data.stamps import top_ids
from geon.data.tokenizers import FILE, GPT2, open_codec
from geon.data.web import DownloadError, Patience
from geon.errors import UsageError
from geon.launch.env import hub_endpoint
from geon.scripts.flags import whole

REPO, PATTERN = "kjj0/fineweb10B-gpt2", "*.bin"
_GPT2_IDS, _GPT2_EOT = 50257, 50256
"""Vocabulary of GPT-2 and its <|endoftext|>, which stands before each document of FineWeb."""
_AHEAD = Patience(tries=4)
"""For the lists of files, which come before anything is under way."""


def add_fineweb(subparsers: Any) -> None:
    """Add the subcommand to a command line."""
    parser = subparsers.add_parser(
        "fineweb10b",
        help="fetch FineWeb as GPT-2 tokens, or another public data set of token shards",
        description="Fetch shards of 100M tokens (200 MB) each, verified and resumed; then train "
        "by data=bins data.dir=OUT.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--shards", type=whole(0, 10**6), default=18, help="training shards; 0: all (default 18)"
    )
    parser.add_argument("--repo", default=REPO, help=f"data set OWNER/NAME (default {REPO})")
    parser.add_argument(
        "--pattern", default=PATTERN, help="files of it; those with 'val' in the name validate"
    )
    parser.add_argument(
        "--tokenizer",
        default=None,
        help="what made the ids: gpt2, OWNER/NAME, a tokenizer.json, or none (default: gpt2 for "
        f"{REPO}, else none)",
    )
    parser.add_argument("--endpoint", default=None, help=f"hub, or HF_ENDPOINT (default {PUBLIC})")
    parser.add_argument("--jobs", type=whole(1, 32), default=4, help="files at a time (default 4)")
    parser.set_defaults(run=run, kept="what was fetched is kept")


def run(args: argparse.Namespace) -> None:
    """Fetch, and write meta.json."""
    endpoint = args.endpoint or hub_endpoint() or PUBLIC
    known = args.repo == REPO
    tokenizer = args.tokenizer or ("gpt2" if known else "none")
    commit, files = list_files(
        endpoint, "datasets", args.repo, lambda path: fnmatchcase(path, args.pattern), _AHEAD
    )
    train = [one for one in files if not _validates(one.name)]
    val = [one for one in files if _validates(one.name)]
    if not train or not val:
        words = "training" if not train else "validation"
        raise UsageError(
            f"--pattern '{args.pattern}' matches no {words} file in {args.repo}, whose name has "
            f"{'no' if not train else 'a'} 'val' in it"
        )
    if args.shards > len(train):
        raise UsageError(f"--shards {args.shards}: {args.repo} has {len(train)}")
    folder = args.out.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{args.out}' cannot be made: {error.strerror}") from None
    chosen = train[: args.shards or None]
    # Those of an earlier, larger request stay in use, and are verified like the others.
    chosen += [one for one in train if one not in chosen and (folder / one.name).is_file()]
    wanted = val + chosen
    total = sum(one.size for one in wanted)
    left = missing(wanted, folder)
    print(
        f"{args.repo}: {len(chosen)} training and {len(val)} validation shards, about "
        f"{(total - 1024 * len(wanted)) / 2e9:.2f} billion tokens, {total / 1e9:.2f} GB, into "
        f"'{folder}'; {left / 1e9:.2f} GB to fetch",
        flush=True,
    )
    with locked(folder):
        made_by, vocab, eot = _tokenizer(endpoint, tokenizer, folder)
        with _Bar(total) as bar:
            moved = fetch_all(wanted, folder, bar.show, _check, args.jobs)
        for path in moved:
            print(f"geon: a file that is not the server's was moved to '{path}'", file=sys.stderr)
        splits = {"train": chosen, "val": val}
        shards = _open(folder, splits)
        meta = Meta(
            dtype=shards["train"][0].dtype.name,
            vocab_size=_vocabulary(shards, vocab),
            eot=eot,
            source=f"{args.repo}@{commit}",
            tokenizer=made_by,
            splits={name: _split(files, shards[name]) for name, files in splits.items()},
        )
        write_meta(folder, meta)
    tokens = {name: split.tokens for name, split in meta.splits.items()}
    print(
        f"{tokens['train']:,} training and {tokens['val']:,} validation tokens, every file "
        f"verified; train on them by: python train.py data=bins data.dir={folder}"
    )


def _validates(name: str) -> bool:
    return "val" in name.lower()


class _Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, every: float = 30.0) -> None:
        self._bar = tqdm(total=total, unit="B", unit_scale=True, smoothing=0.05, disable=None)
        self._total, self._every, self._last = total, every, time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, here: int) -> None:
        """Show how many bytes are here."""
        if not self._bar.disable:
            self._bar.update(here - self._bar.n)
        elif time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            print(f"{here / 1e9:.2f} of {self._total / 1e9:.2f} GB", flush=True)


def _check(path: Path) -> None:
    """Hold the header of a shard against its size."""
    open_bin(path, 2**24, "--repo")


def _tokenizer(
    endpoint: str, name: str, folder: Path
) -> tuple[TokenizerMeta | None, int, int | None]:
    """Bring a tokenizer.json beside the shards; where it cannot be had, training does without.

    Returns: it, its vocabulary (0 where not known), and the id before each document.
    """
    gpt2 = (_GPT2_IDS, _GPT2_EOT) if name == "gpt2" else (0, None)
    if name == "none":
        return None, *gpt2
    target, path = folder / FILE, Path(name).expanduser()
    if path.is_file() and path.resolve() != target.resolve():
        shutil.copyfile(path, target)
    try:
        if not path.is_file():
            _fetch_tokenizer(endpoint, GPT2 if name == "gpt2" else name, folder)
        codec = open_codec(str(target))
    except (DownloadError, UsageError) as error:
        print(f"geon: no tokenizer, so no nats/byte and no samples: {error}", file=sys.stderr)
        return TokenizerMeta(name), *gpt2
    eot = gpt2[1] if codec.eot is None else codec.eot
    return TokenizerMeta(name, codec.fingerprint, FILE), codec.vocab_size, eot


def _fetch_tokenizer(endpoint: str, repo: str, folder: Path) -> None:
    _, found = list_files(endpoint, "models", repo, lambda path: path == FILE, _AHEAD)
    if not found:
        raise DownloadError(f"{repo} has no {FILE}")
    fetch_all(found, folder, lambda here: None, lambda path: None, 1, _AHEAD)


def _split(files: Sequence[Remote], shards: Sequence[Shard]) -> SplitMeta:
    pairs = zip(files, shards, strict=True)
    return SplitMeta(
        tuple(ShardFile(f.name, len(shard), "" if f.git else f.digest) for f, shard in pairs)
    )


def _open(folder: Path, splits: Mapping[str, Sequence[Remote]]) -> dict[str, list[Shard]]:
    """Open verified files, all of one dtype."""
    shards = {
        name: [open_bin(folder / one.name, 2**24, "--repo") for one in files]
        for name, files in splits.items()
    }
    dtypes = {shard.dtype.name for some in shards.values() for shard in some}
    if len(dtypes) > 1:
        raise UsageError(f"the shards hold {' and '.join(sorted(dtypes))}: narrow --pattern")
    return shards


def _vocabulary(shards: Mapping[str, Sequence[Shard]], tokenizer: int) -> int:
    """The tokenizer's vocabulary, or what the ids need. Looks at every id, for training too."""
    top = max(top_ids([shard for some in shards.values() for shard in some]))
    if 0 < tokenizer <= top:
        raise UsageError(
            f"the shards hold token id {top}, and the tokenizer has {tokenizer} ids: name the one "
            "that made them by --tokenizer, or none"
        )
    return tokenizer or top + 1
