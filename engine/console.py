"""train.log of a run folder: what the console showed while the run was trained."""

import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

LOG = "train.log"
MOST_KEPT = 1 << 20
"""Characters that wait for a run folder."""


class Console:
    """Copies what is printed into train.log, once there is a run folder; the main rank's only.

    Of a progress bar, which draws one line again and again, the last state is copied. A log that
    cannot be written is given up without a word: the console has it all.
    """

    def __init__(self, active: bool) -> None:
        self._active = active
        self._waiting = ""
        self._file: TextIO | None = None
        self._taken: list[tuple[str, Any, _Copied]] = []

    def __enter__(self) -> "Console":
        if self._active:
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                copied = _Copied(stream, self)
                setattr(sys, name, copied)
                self._taken.append((name, stream, copied))
        return self

    def keep(self, folder: Path) -> None:
        """Write what was printed up to now, and what will be, behind what is there."""
        if not self._active:
            return
        with suppress(OSError):
            self._file = (folder / LOG).open("a", encoding="utf-8", errors="replace")
        waiting, self._waiting = self._waiting, ""
        self.copy(waiting)

    def copy(self, text: str) -> None:
        """Add text to the log."""
        if self._file is None:
            self._waiting = (self._waiting + text)[-MOST_KEPT:]
            return
        try:
            self._file.write(text)
            self._file.flush()
        except (OSError, ValueError):
            self._file, self._active = None, False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, stream, copied in self._taken:
            copied.finish()
            if getattr(sys, name) is copied:  # else somebody else has taken it meanwhile
                setattr(sys, name, stream)
        if error is not None and str(error):
            self.copy(f"geon: {type(error).__name__}: {error}\n")
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file, self._waiting = None, ""


class _Copied:
    """A stream of text that goes to the console and, by whole lines, to the log."""

    def __init__(self, stream: Any, console: Console) -> None:
        self._stream = stream
        self._console: Console | None = console
        self._line = ""

    def write(self, text: str) -> int:
        """Write to the console first: an error of it is the caller's, as it was before."""
        written = self._stream.write(text)
        if self._console is not None:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._console.copy(f"{_last_drawn(line)}\n")
            self._line = _last_drawn(self._line)
        return len(text) if written is None else written

    def finish(self) -> None:
        """Copy the line that has no end yet, and nothing from here on."""
        if self._console is not None and self._line.strip():
            self._console.copy(f"{self._line}\n")
        self._console = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _last_drawn(line: str) -> str:
    """What a terminal shows of a line after its carriage returns."""
    *drawn, last = line.rstrip("\r").split("\r")
    return (
        last if last.strip() or not drawn else next((d for d in reversed(drawn) if d.strip()), "")
    )
