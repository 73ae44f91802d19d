"""The subcommand `tokenize` of prepare_data: anyone's text as shards of tokens."""

import argparse
import contextlib
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from geon.data.documents import parts
from geon.data.prepare import Job, tokenize
from geon.errors import UsageError
from geon.scripts.flags import number, whole


def add_tokenize(subparsers: Any) -> None:
    """Add the subcommand to a command line."""
    parser = subparsers.add_parser(
        "tokenize",
        help="make shards of text: files, folders, or a Hugging Face dataset",
        description="Make shards of text; then train by data=bins data.dir=OUT. A command that "
        "was stopped goes on where it is given again.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=".txt or .jsonl, also .gz and .zst; .parquet; a folder; or a dataset's name",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--tokenizer",
        type=_tokenizer,
        default="gpt2",
        help="bytes, gpt2, a tokenizer.json or its folder, OWNER/NAME on the hub, or train:16384 "
        "(default gpt2)",
    )
    parser.add_argument("--field", default="text", help="field of JSON, or column (default text)")
    parser.add_argument("--subset", default="", help="configuration of a dataset")
    parser.add_argument("--split", default="train", help="split of a dataset (default train)")
    parser.add_argument(
        "--val-percent",
        type=number(0.009, 99.99),
        default=1.0,
        help="share of the documents, by the hash of their text, that validates (default 1)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=whole(1024, 2**31 - 1),
        default=10**8,
        help="tokens of a shard (default 100000000)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=cores or 1,
        help="processes that encode; the shards do not depend on it (default: the cores)",
    )
    parser.add_argument(
        "--dtype", choices=("uint16", "uint32"), default="", help="default: what the ids need"
    )
    parser.add_argument(
        "--skip-undecodable", action="store_true", help="leave out what is not UTF-8, and count it"
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="never removes what an earlier command made in OUT (default auto: goes on)",
    )
    parser.set_defaults(run=run, kept="what is done is kept")


def run(args: argparse.Namespace) -> None:
    """Tokenize."""
    folder = args.out.expanduser()
    for source in args.sources:
        root = Path(source).expanduser()
        if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
            raise UsageError(f"--out '{args.out}' lies in '{source}': choose one outside of it")
    found = parts(args.sources, args.field, args.subset, args.split)
    if any(Path(part.path).resolve().is_relative_to(folder.resolve()) for part in found):
        raise UsageError(f"--out '{args.out}' holds a source: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{args.out}' cannot be made: {error.strerror}") from None
    job = Job(
        found,
        " ".join(args.sources),
        args.tokenizer,
        args.val_percent,
        args.shard_tokens,
        args.dtype,
        args.skip_undecodable,
    )
    start = time.perf_counter()
    with _locked(folder), _Bar(_total(job)) as bar:
        done = tokenize(
            job, folder, args.workers, args.resume == "auto", bar.show, lambda line: bar.say(line)
        )
    seconds = time.perf_counter() - start
    train, val = done.meta.splits["train"], done.meta.splits["val"]
    if done.already:
        print(f"'{folder}' is made already, by this command")
    for name, split in done.meta.splits.items():
        print(
            f"{name}: {split.documents:,} documents, {(split.bytes or 0) / 1e6:.2f} MB, "
            f"{split.tokens:,} tokens in {len(split.shards)} shards"
        )
    if not done.exact:
        print("this tokenizer does not give back exact bytes: losses are in nats per token alone")
    if done.skipped:
        print(f"left out, because it is not UTF-8: {done.skipped:,} documents")
    if done.cpu:
        print(
            f"{done.encoded / 1e6:.1f} MB in {seconds:.1f} s with {args.workers} processes: "
            f"{done.encoded / 1e6 / seconds:.2f} MB/s; encoding alone "
            f"{done.encoded / 1e6 / done.cpu:.2f} MB/s a core"
        )
    print(
        f"{train.tokens + val.tokens:,} tokens; train on them by: "
        f"python train.py data=bins data.dir={shlex.quote(str(folder))}"
    )


def _total(job: Job) -> int | None:
    """Bytes of the text, where the files' sizes say it."""
    plain = all(part.kind in ("text", "jsonl") and not part.packed for part in job.parts)
    return sum(part.size for part in job.parts) if plain else None


def _tokenizer(text: str) -> str:
    """A tokenizer's name; the size in train:SIZE is checked."""
    if not text.startswith("train:"):
        return text
    if not re.fullmatch(r"train:\d{3,7}", text) or not 257 <= int(text[6:]) <= 2**20:
        raise argparse.ArgumentTypeError(f"'{text}': give train:SIZE, SIZE between 257 and 2^20")
    return text


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    """Keep other processes from writing into a folder meanwhile; ends with the process."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".tokenize.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing into '{folder}'") from None
        except OSError:
            pass  # a file system without locks
        yield


class _Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int | None, every: float = 30.0) -> None:
        self._bar = tqdm(total=total, unit="B", unit_scale=True, smoothing=0.05, disable=None)
        self._every, self._last = every, time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line)

    def show(self, read: int) -> None:
        """Show how much text is encoded."""
        if not self._bar.disable:
            self._bar.update(read - self._bar.n)
        elif time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            print(f"{read / 1e6:.0f} MB of text encoded", flush=True)
