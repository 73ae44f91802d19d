"""Documents of a Hugging Face dataset, streamed. The one file that imports `datasets`, lazily."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geon.errors import UsageError

_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_EDGE = 1 << 16
"""Bytes of both ends of a local file that its fingerprint takes."""


@dataclass(frozen=True)
class Where:
    """A dataset by name.

    Attributes:
        dataset: name on the hub, or a local file or folder of .jsonl, .json, .parquet or .txt,
            which may be packed (.gz, .zst, .bz2, .xz).
        subset: its configuration; "" takes the only one.
        split: train, or another that it has.
        field: column of the text.
        revision: commit on the hub; "" takes the newest.
    """

    dataset: str
    subset: str = ""
    split: str = "train"
    field: str = "text"
    revision: str = ""

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        return Path(self.dataset).expanduser().exists()


class Documents:
    """One disjoint part of a dataset: its documents in the order of an epoch.

    Files are dealt to the parts where their number divides, else each part takes every `parts`-th
    document of all, so nothing is read twice and nothing is left out.
    """

    def __init__(self, opened: Any, where: Where, part: int, parts: int) -> None:
        """opened: what `open_dataset` gave."""
        self._opened, self._where, self._part, self._parts = opened, where, part, parts

    def begin(self, order: int, state: Mapping[str, Any] | None = None) -> "Reading":
        """Begin an epoch, or go on within one.

        order: key of the order of the files; 0 keeps theirs.
        state: what `Reading.state` gave in the epoch of this key.
        """
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(self._opened, self._part, self._parts)
        part.set_epoch(order)
        if state is not None:
            part.load_state_dict(dict(state))
        return Reading(part, self._where)


class Reading:
    """An epoch of a part, document by document."""

    def __init__(self, part: Any, where: Where) -> None:
        self._part, self._where = part, where
        self._rows: Iterator[Any] = iter(part)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next document.

        Raises:
            UsageError: a row without text in the field.
        """
        row = next(self._rows)
        text = row.get(self._where.field)
        if not isinstance(text, str):
            raise UsageError(
                f"data.dataset '{self._where.dataset}': a row has no text in "
                f"data.field '{self._where.field}' (its columns: {', '.join(map(str, row))})"
            )
        return text

    def state(self) -> dict[str, Any]:
        """Where the next document lies, for JSON."""
        found: dict[str, Any] = self._part.state_dict()
        return found


def open_dataset(where: Where) -> Any:
    """Open a dataset for streaming: its index is read, none of its documents.

    Raises:
        UsageError: no `datasets` package, no such dataset, subset, split or field.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "data=stream needs the 'datasets' package: pip install 'geon[data]'"
        ) from None
    datasets.disable_progress_bars()
    logging.getLogger("datasets.iterable_dataset").setLevel(logging.ERROR)
    words = f"data.dataset '{where.dataset}' (subset '{where.subset}', split '{where.split}')"
    try:
        opened = datasets.load_dataset(**_arguments(where), split=where.split, streaming=True)
        columns = opened.column_names
    except UsageError:
        raise
    except StopIteration:
        raise UsageError(f"{words} holds no documents (data.dataset)") from None
    except Exception as error:  # the libraries below have many
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{words} cannot be opened: {type(error).__name__}: {reason} (data.dataset, "
            "data.subset, data.split)"
        ) from None
    if columns is not None:
        if where.field not in columns:
            raise UsageError(
                f"{words} has no column '{where.field}': set data.field to one of "
                f"{', '.join(columns)}"
            )
        opened = opened.select_columns([where.field])
    return opened


def saved(folder: str, field: str) -> Iterator[str]:
    """Texts of a folder that `save_to_disk` of datasets wrote; they stay on the disk till asked.

    Raises:
        UsageError: no `datasets` package, a folder that is cut, no text in the field.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"'{folder}' was saved by the 'datasets' package, and needs it: "
            "pip install 'geon[data]'"
        ) from None
    try:
        rows = datasets.load_from_disk(folder)
    except Exception as error:  # the libraries below have many
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"'{folder}' cannot be opened: {type(error).__name__}: {reason}") from None
    if field not in rows.column_names:
        raise UsageError(
            f"'{folder}' has no column '{field}': set data.field (--field of prepare_data) to one "
            f"of {', '.join(rows.column_names)}"
        )
    return iter(Reading(rows.select_columns([field]), Where(folder, field=field)))


def _arguments(where: Where) -> dict[str, Any]:
    """Arguments of load_dataset."""
    named = {"name": where.subset} if where.subset else {}
    if not where.local:
        return {"path": where.dataset, "revision": where.revision or None, **named}
    if where.revision:
        raise UsageError(
            f"data.revision '{where.revision}' is of a dataset on the hub; '{where.dataset}' is a "
            "local one: leave it out"
        )
    place = Path(where.dataset).expanduser()
    if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UsageError(
            f"data.dataset '{where.dataset}' was saved by save_to_disk, and is not streamed: read "
            "it by data=text data.path, or make shards of it by `python -m "
            "geon.scripts.prepare_data tokenize`"
        )
    kinds = {kind for file in _files(where) if (kind := _kind(file))}
    if not kinds:
        raise UsageError(
            f"data.dataset '{where.dataset}' holds no file that ends in {', '.join(_KINDS)} "
            f"(or those with {', '.join(_PACKED)})"
        )
    if len(kinds) > 1:
        raise UsageError(
            f"data.dataset '{where.dataset}' holds files of several kinds ({', '.join(kinds)}): "
            "give a folder or file of one"
        )
    (kind,) = kinds
    whole = {"sample_by": "document"} if kind == "text" else {}
    if place.is_file():
        return {"path": kind, "data_files": {where.split: [str(place)]}, **named, **whole}
    return {"path": str(place.absolute()), **named, **whole}


def _kind(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix in _PACKED else file.suffix
    return _KINDS.get(suffix)


def _files(where: Where) -> list[Path]:
    """Files of a local dataset by name, hidden ones left out."""
    place = Path(where.dataset).expanduser()
    if place.is_file():
        return [place]
    found = (file for file in place.rglob("*") if file.is_file())
    return sorted(f for f in found if not any(p[0] == "." for p in f.relative_to(place).parts))


def identify(where: Where) -> dict[str, Any]:
    """What a dataset is: its commit on the hub, or a SHA-256 over its local files.

    Cost: of a local file, 128 KiB are read.

    Raises:
        UsageError: it is neither there nor on the hub, or the hub does not answer.
    """
    if where.local:
        place = Path(where.dataset).expanduser()
        digest = hashlib.sha256()
        files = _files(where)
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(place)} {size} ".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(_EDGE))
                opened.seek(max(0, size - _EDGE))
                digest.update(opened.read(_EDGE))
        return {"files": len(files), "fingerprint": digest.hexdigest()}
    if where.dataset.startswith(("/", ".", "~")) or where.dataset.count("/") > 1:
        raise UsageError(
            f"data.dataset '{where.dataset}' does not exist (looked in {Path.cwd()}), and is no "
            "name of a dataset on the hub"
        )
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UsageError(
            "data=stream needs the 'datasets' package: pip install 'geon[data]'"
        ) from None
    try:
        commit = HfApi().dataset_info(where.dataset, revision=where.revision or None).sha
    except Exception as error:  # no network, no such name, no leave
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"data.dataset '{where.dataset}' is no file or folder here, and the hub does not give "
            f"it: {type(error).__name__}: {reason}"
        ) from None
    return {"revision": commit, "fingerprint": f"{where.dataset}@{commit}"}
