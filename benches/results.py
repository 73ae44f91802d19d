"""The result files of benches and studies: one writer, five digits, a row a line."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DIGITS = 5


def rounded(content: Any) -> Any:
    """Round every float to five significant digits; whole ones become integers of all digits."""
    if isinstance(content, Mapping):
        words = (key if isinstance(key, str) else json.dumps(key) for key in content)
        return dict(zip(words, map(rounded, content.values()), strict=True))
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    if not isinstance(content, float) or not math.isfinite(content):
        return content
    kept = content if content.is_integer() else float(f"{content:.{DIGITS}g}")
    return int(kept) if kept.is_integer() else kept


def text_of(content: Mapping[str, Any]) -> str:
    """JSON of a result: a key a line; lists and mappings of rows, and only those, a row a line."""
    parts = [f"{json.dumps(key)}: {_value(value)}" for key, value in rounded(content).items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _value(value: Any) -> str:
    inner = list(value.values() if isinstance(value, dict) else value) if _holds(value) else []
    if isinstance(value, dict) and set(value) == {"columns", "rows"}:
        return text_of(value).rstrip()
    if not inner or not all(map(_holds, inner)):
        return _line(value)
    if isinstance(value, list):
        return "[\n" + ",\n".join(f" {_line(row)}" for row in value) + "\n]"
    rows = (f" {json.dumps(key)}: {_line(row)}" for key, row in value.items())
    return "{\n" + ",\n".join(rows) + "\n}"


def _holds(value: Any) -> bool:
    return isinstance(value, dict | list)


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the same keys as {"columns": keys, "rows": lists of values}: each key once."""
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[row[key] for key in columns] for row in rows]}


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that `table` was given."""
    return [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file; what is not finite stays NaN or Infinity, as Python reads them."""
    path.write_text(text_of(content), encoding="utf-8")
