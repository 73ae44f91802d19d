"""Documents of text files, JSON lines, parquet and datasets, in parts that are read alone."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from geon.data import columns, foreign
from geon.data.folders import files_below
from geon.data.hf import Where
from geon.data.packed import bare_suffix, chunks, packing
from geon.errors import UsageError

PIECE = 1 << 20
"""A text file is one document; a larger one comes in pieces of about so many bytes."""
PART = 1 << 26
"""A larger file that is not packed is several parts, of about so many bytes each."""
_LINE = 1 << 28
"""Longest line of JSON, in bytes."""
UNDECODABLE = "undecodable"
"""What is skipped is counted under this name."""
_JSON_LINES = (".jsonl", ".ndjson")


class Document(NamedTuple):
    """A text and where it lies.

    Attributes:
        text: any Unicode text that UTF-8 can hold.
        where: file and line, byte or row, for people.
        follows: goes on with the text of the document before: no separator is between them.
    """

    text: str
    where: str
    follows: bool = False


@dataclass(frozen=True)
class Part:
    """Documents that are read alone, in one process; picklable.

    Attributes:
        path: file, or name of a dataset.
        kind: text, jsonl, parquet, saved or hub.
        field: of a JSON object, or column.
        packed: gzip, zstd or ''.
        start, stop: bytes of a file, cut at the ends of lines (a stop of 0 is its end), or row
            groups of parquet, or part `start` of `stop` of a dataset on the hub.
        size: bytes on the disk, about; 0 where not known.
        subset, split, revision: of a dataset on the hub.
    """

    path: str
    kind: str
    field: str
    packed: str = ""
    start: int = 0
    stop: int = 0
    size: int = 0
    subset: str = ""
    split: str = "train"
    revision: str = ""

    def documents(
        self, skip_undecodable: bool = False, counts: Counter[str] | None = None
    ) -> Iterator[Document]:
        """Read the documents in their order.

        skip_undecodable: leave out what is not UTF-8: a file, a piece of a large one, a line.
        counts: how many were left out is added to counts['undecodable'].

        Raises:
            UsageError: names the file, the place, and what was expected.
        """
        bad = _Bad(skip_undecodable, Counter() if counts is None else counts)
        try:
            if self.kind == "text":
                yield from _pieces(self, bad)
            elif self.kind == "jsonl":
                yield from _objects(self, bad)
            else:
                for text, where in columns.texts(self):
                    if isinstance(text, str):
                        yield Document(text, where)
                    else:
                        bad.meet(f"{where} is not UTF-8: byte {text.start} of the text")
        except OSError as error:
            raise unreadable(error, Path(self.path)) from None


@dataclass
class _Bad:
    """What is not UTF-8: refused, or counted."""

    skip: bool
    counts: Counter[str]

    def meet(self, words: str) -> None:
        if not self.skip:
            raise UsageError(
                f"{words}; convert it, or leave out what cannot be decoded by "
                "data.skip_undecodable=true (--skip-undecodable of prepare_data)"
            )
        self.counts[UNDECODABLE] += 1


def documents(
    sources: Sequence[str],
    field: str = "text",
    skip_undecodable: bool = False,
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """All documents of some sources, in the order in which they are named; see `parts`."""
    for part in parts(sources, field):
        yield from part.documents(skip_undecodable, counts)


def parts(
    sources: Sequence[str], field: str = "text", subset: str = "", split: str = "train"
) -> list[Part]:
    """What can be read independently, in the order of the documents.

    sources: each a text file, .jsonl, either packed by gzip or zstd, parquet, a folder of such
        files, a folder that `datasets` saved, or the name of a dataset on the hub.
    field: of JSON objects, and column of tables.
    subset, split: of datasets.

    Raises:
        UsageError: a source that is not there, holds nothing, or is read twice.
    """
    found: list[Part] = []
    seen: dict[Path, str] = {}
    for source in sources:
        root = Path(source).expanduser()
        try:
            if not root.exists():
                found += _hub_parts(Where(source, subset, split, field))
                continue
            if saved := columns.saved_folder(root, split):
                found.append(Part(str(saved), "saved", field, split=split))
                continue
            files = [root] if root.is_file() else files_below(root)
            for file in files:
                real = file.resolve()
                if real in seen:
                    raise UsageError(
                        f"'{file}' is read twice, by '{seen[real]}' and by '{source}': name it once"
                    )
                seen[real] = source
                found += file_parts(file, field)
        except OSError as error:
            raise unreadable(error, root) from None
        if not files:
            raise UsageError(f"'{source}' holds no files (hidden ones are left out)")
    return found


def _hub_parts(where: Where) -> list[Part]:
    where, count = columns.on_hub(where)
    named = {"subset": where.subset, "split": where.split, "revision": where.revision}
    return [
        Part(where.dataset, "hub", where.field, start=i, stop=count, **named) for i in range(count)
    ]


def file_parts(file: Path, field: str) -> list[Part]:
    """Parts of one file.

    Raises:
        UsageError: a parquet file that cannot be read.
        OSError: a file that cannot be read.
    """
    if file.suffix == ".parquet":
        groups = columns.row_groups(file, field)
        return [Part(str(file), "parquet", field, "", *group) for group in groups]
    packed, size = packing(file), file.stat().st_size
    lines = bare_suffix(file) in _JSON_LINES or (
        bare_suffix(file) == ".json" and _begins_as_lines(file, packed, field)
    )
    kind = "jsonl" if lines else "text"
    if packed or size <= PART:
        return [Part(str(file), kind, field, packed, 0, 0, size)]
    starts = [0, *_line_starts(file, size)]
    return [
        Part(str(file), kind, field, "", start, stop, (stop or size) - start)
        for start, stop in zip(starts, [*starts[1:], 0], strict=True)
    ]


def _begins_as_lines(file: Path, packed: str, field: str) -> bool:
    """Whether the first line of a .json file is an object with the field, as in C4."""
    first = next(iter(chunks(file, packed)), b"").split(b"\n", 1)[0]
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and isinstance(row.get(field), str)


def _line_starts(file: Path, size: int) -> list[int]:
    """Places about PART bytes apart at which lines begin."""
    found: list[int] = []
    while (at := (found[-1] if found else 0) + PART) < size:
        for chunk in chunks(file, "", at):
            if end := chunk.find(b"\n") + 1:
                break
            at += len(chunk)
        else:
            break
        if at + end >= size:
            break
        found.append(at + end)
    return found


def unreadable(error: OSError, path: Path) -> UsageError:
    """What to say of a file or folder that the system does not give."""
    named = error.filename or path
    return UsageError(
        f"'{named}' cannot be read: {error.strerror or error}: make it readable, or choose other "
        "text"
    )


def _pieces(part: Part, bad: _Bad) -> Iterator[Document]:
    """A text, in pieces that end with a line where one ends in it."""
    at, follows, rest = part.start, bool(part.start), b""
    path = Path(part.path)

    def piece(raw: bytes) -> Iterator[Document]:
        nonlocal at, follows
        try:
            yield Document(raw.decode("utf-8"), f"'{path}'" + f", byte {at}" * bool(at), follows)
            follows = True
        except UnicodeDecodeError as error:
            follows = False
            found = foreign.kind(path, raw[: foreign.HEAD_BYTES]) if not at else ""
            what = f" (it is {found})" if found else ""
            bad.meet(
                f"'{path}' is not UTF-8{what}: byte {at + error.start} is 0x{raw[error.start]:02x}"
            )
        at += len(raw)

    for chunk in chunks(path, part.packed, part.start, part.stop):
        rest += chunk
        if not at and rest[257:262] == b"ustar":
            bad.meet(f"'{path}' is a tar archive, no text: unpack it")
            return
        while len(rest) > PIECE:
            end = rest.rfind(b"\n", 0, PIECE) + 1 or _character(rest, PIECE)
            yield from piece(rest[:end])
            rest = rest[end:]
    if rest or not at:
        yield from piece(rest)


def _character(raw: bytes, at: int) -> int:
    """A place near `at` where a UTF-8 character begins."""
    return next((cut for cut in range(at, at - 4, -1) if raw[cut] & 0xC0 != 0x80), at)


def _objects(part: Part, bad: _Bad) -> Iterator[Document]:
    """Texts of JSON lines; empty lines are none."""
    path = Path(part.path)
    for number, at, line in _lines(part):
        where = f"'{path}', " + (f"byte {at}" if part.start else f"line {number}")
        try:
            text = line.removeprefix(b"\xef\xbb\xbf" if not at else b"").decode("utf-8")
        except UnicodeDecodeError as error:
            bad.meet(f"{_place(part, number)} is not UTF-8: byte {error.start} of the line")
            continue
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{_place(part, number)} is no JSON ({error}): a .jsonl file has one object a "
                f'line, such as {{"{part.field}": "a text"}}'
            ) from None
        if not isinstance(row, dict) or part.field not in row:
            keys = f"an object with {', '.join(row) or 'no field'}" if isinstance(row, dict) else ""
            raise UsageError(
                f"{_place(part, number)} has no field '{part.field}' (it is "
                f"{keys or _word(row)}): name the field of the text by data.field (--field of "
                "prepare_data)"
            )
        if not isinstance(found := row[part.field], str):
            raise UsageError(
                f"{_place(part, number)}: field '{part.field}' is {_word(found)}, and a text is "
                "expected: name another by data.field (--field of prepare_data)"
            )
        if "\\u" in text and _lone_surrogate(found):
            bad.meet(f"{_place(part, number)} holds half a character (a lone surrogate)")
            continue
        yield Document(found, where)


def _word(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false"}
    return names.get(type(value), "a text" if isinstance(value, str) else "a number")


def _lone_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _lines(part: Part) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a part: number within it, place in the file, bytes."""
    number, at, length = 0, part.start, 0
    pending: list[bytes] = []
    for chunk in chunks(Path(part.path), part.packed, part.start, part.stop):
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            whole = b"".join([*pending, line]) if pending else line
            number, pending, length = number + 1, [], 0
            yield number, at, whole
            at += len(whole) + 1
        if rest:
            pending.append(rest)
            length += len(rest)
        if length > _LINE:
            raise UsageError(
                f"{_place(part, number + 1)} is longer than {_LINE >> 20} MiB: a .jsonl file has "
                "one object a line"
            )
    if pending:
        yield number + 1, at, b"".join(pending)


def _place(part: Part, number: int) -> str:
    """File and line; lines before the part are counted only for this."""
    if part.start:
        before = chunks(Path(part.path), part.packed, 0, part.start)
        number += sum(chunk.count(b"\n") for chunk in before)
    return f"'{part.path}', line {number}"
