"""Texts in a column: parquet files, folders that `datasets` saved, datasets on the hub."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geon.data import hf
from geon.errors import UsageError

if TYPE_CHECKING:
    from geon.data.documents import Part

_ROWS = 512
"""Rows that are made text at a time."""
_GROUPS = 1 << 26
"""Row groups of about so many bytes are a part."""


def row_groups(file: Path, field: str) -> list[tuple[int, int, int]]:
    """Row groups of a parquet file that are read together: first, last + 1, and bytes.

    Raises:
        UsageError: no parquet file, no such column, or one that holds no text.
        OSError: it cannot be read.
    """
    table = _parquet(file, field)
    sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
    found, start, size = [], 0, 0
    for i, one in enumerate(sizes):
        size += one
        if size >= _GROUPS or i == len(sizes) - 1:
            found.append((start, i + 1, size))
            start, size = i + 1, 0
    return found


def saved_folder(folder: Path, split: str) -> Path | None:
    """Folder of a split that `save_to_disk` of datasets wrote; None where it is none of those.

    Raises:
        UsageError: no such split.
    """
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file():
        return None
    if not (folder / split / "state.json").is_file():
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UsageError(
            f"'{folder}' has no split '{split}': name the folder of one "
            f"({', '.join(names)}; --split of prepare_data)"
        )
    return folder / split


def on_hub(where: hf.Where) -> tuple[hf.Where, int]:
    """A dataset on the hub at the commit that it has now, and the number of its shards.

    Raises:
        UsageError: no such dataset, and no such file.
    """
    if Path(where.dataset).suffix in (".txt", ".jsonl", ".parquet", ".gz", ".zst", ".json"):
        raise UsageError(f"'{where.dataset}' does not exist (looked in {Path.cwd()})")
    where = replace(where, revision=hf.identify(where)["revision"])
    return where, max(1, hf.open_dataset(where).num_shards)


def texts(part: "Part") -> Iterator[tuple[str | UnicodeDecodeError, str]]:
    """Texts of a part, each with its place; an error in place of one that is not UTF-8.

    Raises:
        UsageError: a row without text, a file that is cut.
    """
    if part.kind == "parquet":
        yield from _parquet_texts(part)
        return
    if part.kind == "saved":
        rows: Any = hf.saved(part.path, part.field)
    else:
        where = hf.Where(part.path, part.subset, part.split, part.field, part.revision)
        rows = hf.Documents(hf.open_dataset(where), where, part.start, part.stop).begin(0)
    for number, text in enumerate(rows):
        yield text, f"'{part.path}', row {number} of part {part.start}"


def _parquet(file: Path, field: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"'{file}' is parquet, which needs the 'pyarrow' package: pip install 'geon[data]'"
        ) from None
    try:
        # A file of ours: pyarrow's own messages for one that cannot be opened have no path.
        with file.open("rb"):
            table = parquet.ParquetFile(file, pre_buffer=False)
    except pyarrow.ArrowException as error:
        raise UsageError(
            f"'{file}' is no parquet file, or cut ({_first_line(error)}): copy or fetch it again"
        ) from None
    schema = table.schema_arrow
    if field not in schema.names:
        raise UsageError(
            f"'{file}' has no column '{field}': set data.field (--field of prepare_data) to one "
            f"of {', '.join(schema.names)}"
        )
    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise UsageError(
            f"'{file}': column '{field}' holds {kind}, and text is expected: set data.field "
            f"(--field of prepare_data) to another of "
            f"{', '.join(name for name in schema.names if name != field)}"
        )
    return table


def _parquet_texts(part: "Part") -> Iterator[tuple[str | UnicodeDecodeError, str]]:
    import pyarrow

    file = Path(part.path)
    table = _parquet(file, part.field)
    number = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
    groups = range(part.start, part.stop)
    try:
        for batch in table.iter_batches(_ROWS, groups, [part.field], use_threads=False):
            column = batch.column(0)
            for value in column:
                where = f"'{file}', row {number}"
                number += 1
                try:
                    text = value.as_py()
                    text = text.decode("utf-8") if isinstance(text, bytes) else text
                except UnicodeDecodeError as error:
                    yield error, where
                    continue
                if text is None:
                    raise UsageError(
                        f"{where} has no text in column '{part.field}' (null): drop such rows, or "
                        "name another column by data.field (--field of prepare_data)"
                    )
                yield text, where
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(
            f"'{file}' is damaged ({_first_line(error)}): copy or fetch it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
