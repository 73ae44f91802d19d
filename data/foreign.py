"""Files that hold no token ids: what one is, and the command that makes shards of it."""

import shlex
from pathlib import Path

_PREPARE = "python -m geon.scripts.prepare_data"
HEAD_BYTES = 4096
"""Bytes from the start of a file that `kind` looks at."""

_MAGIC = (
    (b"PAR1", "parquet"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow file"),  # a stream; no id is as large
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"version https://git-lfs.github.com", "a Git LFS pointer"),
    (b"MMIDIDX\x00\x00", "an index of Megatron's"),
    (b"SQLite format 3\x00", "a database"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
)
_TEXT_KINDS = {".jsonl": "JSON lines", ".json": "JSON", ".csv": "CSV", ".tsv": "TSV"}
_TAKEN = ("text", "JSON lines", "parquet", "gzip", "zstd")
"""What `prepare_data tokenize` reads."""


def kind(path: Path, start: bytes) -> str:
    """What a file is, by its first bytes; '' where they may be token ids.

    start: its first HEAD_BYTES, or all of it.
    """
    for magic, name in _MAGIC:
        if start.startswith(magic):
            return name
    if path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        return "a pickle"
    if not _is_text(start):
        return ""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<error")):
        return "a web page"
    if text.startswith(b"{") and path.suffix not in _TEXT_KINDS:
        return "JSON lines"
    return _TEXT_KINDS.get(path.suffix, "text")


def _is_text(start: bytes) -> bool:
    """Whether bytes are printable UTF-8, which ids of two bytes are never for long."""
    if len(start) < 16:
        return False
    for cut in range(4):  # a character may be cut at the end
        try:
            text = start[: len(start) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return all(c.isprintable() or c in "\t\r\n\f" for c in text)
    return False


def advice(path: Path, found: str) -> str:
    """What to do with a file of a kind, in one line."""
    file = shlex.quote(str(path))
    made = shlex.quote(str(path.parent / f"{path.name.split('.')[0]}_shards"))
    if found in _TAKEN:
        train = f"`{_PREPARE} tokenize {file} --out {made}`, then data.dir={made}"
        if found in ("text", "JSON lines"):
            return f"make shards of it by {train}; or train on it by data=text data.path={file}"
        return f"make shards of it by {train}"
    if found == "an Arrow file":
        folder = shlex.quote(str(path.parent))
        made = shlex.quote(f"{path.parent}_shards")
        return (
            f"make shards of its folder by `{_PREPARE} tokenize {folder} --out {made}`, then "
            f"data.dir={made}"
        )
    if found == "a Git LFS pointer":
        return (
            f"fetch what it points to by `git lfs pull` in {shlex.quote(str(path.parent))}, or, "
            f"for FineWeb, by `{_PREPARE} fineweb10b --shards 18 --out FOLDER`"
        )
    if found == "a web page":
        return (
            "it is an answer of a server, most likely an error, in place of the file: fetch the "
            f"file again; FineWeb comes by `{_PREPARE} fineweb10b --shards 18 --out FOLDER`"
        )
    if found == "an index of Megatron's":
        return "give the .bin beside it, with data.dtype=uint16 or data.dtype=uint32"
    if found == "a pickle":
        return (
            "no pickle is ever read, because that would run its code: give the .bin files beside "
            "it, with data.dtype=uint16"
        )
    return (
        f"write its text to a .txt or .jsonl file, and make shards by `{_PREPARE} tokenize "
        "FILE --out FOLDER`"
    )


def in_folder(folder: Path) -> str:
    """What to do with a folder that has no meta.json."""
    place = shlex.quote(str(folder))
    ids = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".npy"))
    val = [name for name in ids if "val" in name]
    if train := [name for name in ids if name not in val]:
        first = shlex.quote(str(folder / train[0].replace("000001", "*")))
        other = shlex.quote(str(folder / val[0])) if val else "FILE"
        return (
            f"name its files by data.train={first} data.val={other}, and add data.dtype=uint16 if "
            "they are bare ids, as nanoGPT's"
        )
    return f"make shards of it by `{_PREPARE} tokenize {place} --out FOLDER`, then data.dir=FOLDER"


def headerless(path: Path, key: str) -> str:
    """What to do with a file that may be bare token ids.

    key: the config key that named it, such as data.train.
    """
    return (
        f"if it is bare ids, as nanoGPT's prepare.py writes them, add data.dtype=uint16 (uint32 "
        f"for a vocabulary above 65,536) to {key}={shlex.quote(str(path))}; if it is text, make "
        f"shards of it by `{_PREPARE} tokenize {shlex.quote(str(path))} --out FOLDER`"
    )
