"""Where metrics go: metrics.jsonl always, Weights & Biases and TensorBoard when asked.

No logger may end a run, or hold it up: what it could not write is told on one line.
"""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from geon.configs.schema import LoggerConfig
from geon.engine.runfolder import METRICS, drop_after
from geon.errors import UsageError

ROWS_KEPT = 10_000
"""Rows of metrics.jsonl that wait in memory for a disk that cannot be written: about 6 MB."""


class Logger(ABC):
    """Where metrics go: takes one flat record at a time, on the main rank."""

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Log a record; it has "kind" and "step"."""

    def rewind(self, step: int) -> None:  # noqa: B027 - most cannot take back what they have
        """Drop records of steps after this one: they will come again."""

    def close(self) -> None:  # noqa: B027 - nothing to close is the common case
        """Flush what was logged, and release the logger."""


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line, unless what it is printed to is full or gone: that ends no run either."""
    with suppress(OSError):
        print(text, file=file or sys.stdout, flush=True)


def warn(text: str) -> None:
    """Say on one line what was lost; the run goes on."""
    say(f"geon: warning: {text}", sys.stderr)


def reason(error: BaseException) -> str:
    """An error as part of a line: its type, and the beginning of what it says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


class Jsonl(Logger):
    """Logger of metrics.jsonl: one JSON object a line, and never a part of one.

    A row that cannot be appended waits in memory, and is written with the next that can.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / METRICS
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._since: Any = None
        """Step of the first row that waits."""

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as a line, after those that wait."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        error = self._append()
        if error is None:
            if self._since is not None:
                lost = f"; {self._lost} before them are lost" if self._lost else ""
                warn(f"{self._path} is written again, with the rows since step {self._since}{lost}")
            self._since, self._lost = None, 0
            return
        if self._since is None:
            self._since = record["step"]
            warn(
                f"{self._path} cannot be written ({reason(error)}): training goes on, and rows "
                f"from step {self._since} on are kept in memory until it can"
            )
        if len(self._waiting) > ROWS_KEPT:
            self._waiting.popleft()
            self._lost += 1

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after this one."""
        self.close()
        drop_after(self._folder, step)

    def _append(self) -> OSError | None:
        """Write what waits in one piece; what was written of it in part is cut off again."""
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._file).st_size
            data = b"".join(self._waiting)
            try:
                if (written := os.write(self._file, data)) < len(data):
                    raise OSError(f"{written} of {len(data)} bytes were written")
            except OSError:
                os.ftruncate(self._file, size)
                raise
        except OSError as error:
            return error
        self._waiting.clear()
        return None

    def close(self) -> None:
        """Write what waits, if the disk lets us by now, and close metrics.jsonl."""
        if self._waiting and (error := self._append()) is not None:
            lost = len(self._waiting) + self._lost
            warn(f"{self._path} lacks {lost} rows from step {self._since} on ({reason(error)})")
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Guarded(Logger):
    """A logger of another package: the first thing that fails in it is told, then it is left."""

    def __init__(self, name: str, logger: Logger) -> None:
        self._name = name
        self._logger: Logger | None = logger

    def write(self, record: dict[str, Any]) -> None:
        """Pass a record on, as long as that works."""
        if self._logger is None:
            return
        try:
            self._logger.write(record)
        except Exception as error:
            broken, self._logger = self._logger, None
            warn(
                f"{self._name} failed at step {record['step']} ({reason(error)}): its curves end "
                f"there; training and {METRICS} go on"
            )
            with suppress(Exception):  # it has been told already
                broken.close()

    def close(self) -> None:
        """Close the logger, which may fail as well."""
        logger, self._logger = self._logger, None
        try:
            if logger is not None:
                logger.close()
        except Exception as error:
            warn(f"{self._name} could not be closed ({reason(error)}): its last rows may be lost")


def check_loggers(config: LoggerConfig) -> None:
    """Refuse loggers that cannot be opened, before a run folder exists.

    Raises:
        UsageError: names the package to install, or the mode to choose.
    """
    modes = ("offline", "online", "disabled")
    if config.wandb_mode not in modes:
        raise UsageError(
            f"logger.wandb_mode '{config.wandb_mode}' is not one of {', '.join(modes)}"
        )
    from importlib.util import find_spec

    for wanted, package in ((config.wandb, "wandb"), (config.tensorboard, "tensorboard")):
        if wanted and find_spec(package) is None:
            raise UsageError(f"logger={package} needs the package: pip install 'geon[{package}]'")


def open_loggers(
    folder: Path, config: LoggerConfig, name: str, settings: Any, run_id: str, step: int
) -> list[Logger]:
    """Loggers that the config asks for; one that cannot be opened is told, and left out.

    run_id: what Weights & Biases knows the run by: the same over its resumes, no other run's.
    step: steps that lie behind; rows after it, from before a resume, are not shown twice.
    """
    from geon.engine.trackers import Tensorboard, Wandb

    loggers: list[Logger] = [Jsonl(folder)]
    wanted = (
        (config.wandb, "Weights & Biases", lambda: Wandb(folder, config, name, settings, run_id)),
        (config.tensorboard, "TensorBoard", lambda: Tensorboard(folder, step)),
    )
    for asked, title, make in wanted:
        try:
            if asked:
                loggers.append(Guarded(title, make()))
        except Exception as error:
            warn(
                f"{title} cannot be opened ({reason(error)}): the run goes on without it; "
                f"{METRICS} has all rows"
            )
    return loggers
