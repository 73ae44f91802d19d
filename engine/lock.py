"""One writer a run folder: a lock that a process holds as long as it lives, on any host."""

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from geon.errors import UsageError
from geon.launch.env import started_at

try:
    import fcntl
except ImportError:  # Windows: the process' number and the heartbeat alone
    fcntl = None  # type: ignore[assignment]

LOCK = "lock.json"
HEARTBEAT = 5.0
"""Seconds after which the holder touches the file anew."""
SILENCE = 20.0
"""Seconds without a touch after which a holder on another host is taken for dead."""


class Lock:
    """The right to write into a run folder.

    The file names its holder. On one host, and on file systems that pass it on, `flock` tells
    whether that process lives; elsewhere the times of the file do, which its holder touches. Clocks
    of hosts are not compared: whether the time moves is.
    """

    def __init__(self, job: str = "") -> None:
        """job: an earlier attempt of the same job has ended, wherever it ran."""
        self._job = job
        self._file: int | None = None
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds a folder."""
        return self._file is not None

    def take(self, folder: Path) -> str | None:
        """Take a folder that is there; what was held before is let go.

        Returns: a line on the dead holder that it was taken over from, if there was one.

        Raises:
            UsageError: a live process holds it: names host and process.
        """
        path = folder / LOCK
        try:
            file, sure = self._open(path)
            try:
                said = self._take_over(path, file, sure)
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(self._own()).encode(), 0)
            except BaseException:
                os.close(file)
                raise
        except OSError as error:
            raise UsageError(f"'{path}' cannot be locked: {error}") from None
        self.release()
        self._file, self._path = file, path
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._touch, args=(file, self._stop), daemon=True)
        self._beat.start()
        return said

    def release(self) -> None:
        """Let go, if anything is held: the file is removed, wherever its folder was moved to."""
        if self._file is None:
            return
        self._stop.set()
        assert self._beat is not None
        self._beat.join()
        try:
            own = os.fstat(self._file)
            if self._path.exists() and os.path.samestat(own, self._path.stat()):
                self._path.unlink()
        finally:
            os.close(self._file)
            self._file = None

    def moved(self, folder: Path) -> None:
        """Note that the folder that is held has another name now."""
        self._path = folder / LOCK

    def _own(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started_at(os.getpid()),
            "job": self._job,
        }

    def _open(self, path: Path) -> tuple[int, bool]:
        """Open the file and lock it; whether the lock is one of the system's.

        Raises:
            UsageError: the system says that another process holds it.
        """
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            sure = False
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    sure = True
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                    holder = _read(file)
                    os.close(file)
                    raise _refusal(path, holder) from None
                # ENOLCK, EOPNOTSUPP: this file system has no locks
            try:  # its last holder may have removed it between the two calls
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file, sure
            except FileNotFoundError:
                pass
            os.close(file)

    def _take_over(self, path: Path, file: int, sure: bool) -> str | None:
        """Say who held it and is dead; None if nobody did."""
        holder = _read(file)
        if not holder:
            return None
        here = holder.get("host") == socket.gethostname()
        again = bool(self._job) and holder.get("job") == self._job
        if here and not sure:
            started = started_at(int(holder.get("pid", -1)))
            if started and started == holder.get("started"):
                raise _refusal(path, holder)
        elif not here and not again and _moves(path):
            raise _refusal(path, holder)
        return (
            f"took over {path.parent} from process {holder.get('pid')} on "
            f"{holder.get('host')}, which is gone"
        )

    @staticmethod
    def _touch(file: int, stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT):
            try:
                os.utime(file)
            except OSError:  # a file server that is away for a while: flock is asked first
                continue


def _read(file: int) -> dict[str, Any]:
    """Holder that a file names; {"pid": "?"} if it cannot be read, {} if it is empty."""
    content = os.pread(file, 1 << 16, 0)
    try:
        found = json.loads(content) if content else {}
        return found if isinstance(found, dict) else {"pid": "?"}
    except ValueError:
        return {"pid": "?"}


def _moves(path: Path) -> bool:
    """Whether a holder elsewhere touches the file: waits for as long as that may take."""
    print(f"{path} is held on another host: waiting {SILENCE:.0f} s for a sign of it", flush=True)
    first, end = _time(path), time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE / 10))
        if _time(path) != first:
            return True
    return False


def _time(path: Path) -> int:
    """Time of the last touch, ns; opened anew, so that a network file system asks its server."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _refusal(path: Path, holder: dict[str, Any]) -> UsageError:
    return UsageError(
        f"run folder '{path.parent}' is in use by process {holder.get('pid')} on "
        f"{holder.get('host')}: wait for it, stop it, or choose another name or output"
    )
