"""Who a run is, and what it went through: run.json, and history.jsonl with a row or two a segment.

A segment is a stretch of training by one start of the program. Rows are only appended: "start" when
a segment begins, "end" when it ends by itself; one that was killed has no end.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

import geon
from geon.engine.metrics import hardware
from geon.errors import UsageError
from geon.launch.env import Env

RUN = "run.json"
HISTORY = "history.jsonl"
_ROOT = Path(__file__).resolve().parent.parent


def new_id() -> str:
    """An id that no other run has."""
    return uuid4().hex[:12]


def now() -> str:
    """This second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """JSON objects of a file, one a line; lines that are none are left out, and that is said."""
    if not path.is_file():
        return []
    rows, bad = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
            rows.append(row)
        except ValueError:
            bad.append(number)
    if bad:
        told = f"line {bad[0]}" + (f" and {len(bad) - 1} more are" if bad[1:] else " is")
        _say_once(f"{path}: {told} cut or damaged, and left out")
    return rows


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Segment:
    """One stretch of training.

    Attributes:
        row: its "start" row: number, job, where it started from, settings or their change, machine.
        end: its "end" row; None where it was killed, or still runs.
    """

    row: dict[str, Any]
    end: dict[str, Any] | None = None

    @property
    def number(self) -> int:
        """Counts from 1 in a run; 0 is what came before run folders had a history."""
        return int(self.row["segment"])

    @property
    def first(self) -> int:
        """Steps that lay behind when it started."""
        return int(self.row["first"])

    @property
    def origin(self) -> dict[str, Any] | None:
        """Checkpoint that it started from (path, run, segment, step); None for fresh weights."""
        return self.row.get("resumed")


@dataclass
class History:
    """Identity and segments of the run in a folder; empty where there is none."""

    folder: Path
    run: str | None = None
    segments: list[Segment] = field(default_factory=list)

    @property
    def next(self) -> int:
        """Number of the segment that would be opened now."""
        return max((s.number for s in self.segments), default=0) + 1

    def opened_by(self, env: Env) -> list[Segment]:
        """Segments that earlier attempts of this job opened, oldest first."""
        if not env.job or not (env.launched or env.restart):
            return []
        return [s for s in self.segments if s.row.get("job") == env.job]

    def line(self) -> dict[int, float]:
        """Segments that the run is made of now, and the step up to which each counts.

        A segment that was gone back behind counts up to there, or not at all.
        """
        by_number = {s.number: s for s in self.segments}
        if not by_number:
            return {}
        counted: dict[int, float] = {}
        number, last = max(by_number), float("inf")
        while number not in counted:
            counted[number] = last
            one = by_number.get(number)
            origin = one.origin if one is not None else None
            if origin is None or origin.get("run") not in (self.run, None):
                break
            number, last = int(origin.get("segment") or 0), min(last, float(origin["step"]))
        return counted

    def on_line(self, facts: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is of what the run is made of now, by its commit file.

        Without a history every one is.
        """
        if not self.segments:
            return True
        last = self.line().get(int(facts.get("segment") or 0))
        return last is not None and facts["step"] <= last

    def told(self, step: int) -> list[dict[str, Any]]:
        """The segments of that line for a report, oldest first. step: where it is now."""
        by_number = {s.number: s for s in self.segments}
        found = []
        for number, last in reversed(self.line().items()):
            if number in by_number:
                row = by_number[number].row
                kept = {k: row[k] for k in ("segment", "started", "resumed", "first", "ranks")}
                kept |= {k: row.get(k) for k in ("hardware", "commit", "torch")}
                kept["last"] = int(min(step, last))
                found.append(kept | {"changed": row.get("changed", {})})
        return found


def read(folder: Path) -> History:
    """History of a run folder.

    Raises:
        UsageError: run.json is there and cannot be read.
    """
    found = History(folder)
    if (file := folder / RUN).is_file():
        try:
            found.run = str(json.loads(file.read_text())["run"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"'{file}' cannot be read: {error!r}; restore or remove it") from None
    rows = read_rows(folder / HISTORY)
    ends = {row["segment"]: row for row in rows if row.get("event") == "end"}
    found.segments = [
        Segment(row, ends.get(row["segment"])) for row in rows if row.get("event") == "start"
    ]
    return found


def name(folder: Path, run: str) -> None:
    """Give a run folder its id, which it keeps."""
    if not (folder / RUN).exists():
        _write(folder / RUN, json.dumps({"format": 1, "run": run, "created": now()}) + "\n")


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Add a row to the history; it is on the disk when this returns."""
    with (folder / HISTORY).open("ab+") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):  # a row that was cut short is no row
            file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Replace a small file in one piece."""
    aside = path.with_name(f"{path.name}.writing")
    aside.write_text(text)
    aside.replace(path)


def surroundings(env: Env, device: str) -> dict[str, Any]:
    """Where and by what a segment is trained: for its start row."""
    return {
        "job": env.job,
        "ranks": env.world,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "hardware": hardware(device),
        "geon": geon.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Commit of the checkout that runs, with "+" where files are changed; None without git."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        return subprocess.run(
            [git, "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        changed = ask("status", "--porcelain", "--untracked-files=no")
        return ask("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
