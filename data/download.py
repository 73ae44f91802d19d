"""Files over HTTP that are whole and right, or absent: resumed, retried, verified.

A file grows as `NAME.<digest>.part`, whose name says which content it belongs to, so what is there
is gone on with by any later process. It gets its name when size, checksum and content have been
checked.
"""

import errno
import hashlib
import http.client
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, BinaryIO

from geon.data.web import MIB, DownloadError, Patience, Stopped, Trouble, patiently, request, words

try:
    import fcntl
except ImportError:  # not a Unix: two processes in one folder are the user's care
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Remote:
    """A file of a server, whose content is known by its checksum before it is fetched.

    Attributes:
        name: of the file here. size: bytes.
        digest: hex, of what `git` says: SHA-1 of a git blob, or SHA-256 of the bytes.
    """

    name: str
    url: str
    size: int
    digest: str
    git: bool = False

    def hasher(self) -> Any:
        """A hash that has taken nothing of the content yet."""
        if not self.git:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def part(self, folder: Path) -> Path:
        """Where it grows."""
        return folder / f"{self.name}.{self.digest[:12]}.part"


def fetch(
    remote: Remote,
    folder: Path,
    gain: Callable[[int], None],
    stop: Event,
    patience: Patience,
    check: Callable[[Path], None],
) -> Path | None:
    """Fetch one file, or verify the one that is there.

    gain: told how many bytes more are here; fewer, where some are thrown away.
    check: looks at the whole file before it gets its name.

    Returns: where a wrong file of that name was moved, if there was one.

    Raises:
        DownloadError: it cannot be had. Stopped: on request.
        UsageError: as `check` does.
    """
    final, part, aside = folder / remote.name, remote.part(folder), None
    if final.exists():
        if _matches(final, remote, stop):
            gain(remote.size)
            return None
        aside = final.replace(final.with_name(f"{final.name}.wrong"))
    for last in (False, True):
        with part.open("a+b", buffering=0) as file:
            digest = _grow(remote, file, gain, stop, patience)
            os.fsync(file.fileno())
        if digest == remote.digest:
            break
        gain(-remote.size)
        part.unlink()
        if last:
            raise DownloadError(
                f"{remote.url}: the checksum of what came is {digest[:16]}..., its list says "
                f"{remote.digest[:16]}..., twice: nothing was kept; something on the way changes "
                "it, or the server's file is broken"
            )
    try:
        check(part)
    except Exception:
        part.unlink()
        raise
    part.replace(final)
    return aside


def _grow(
    remote: Remote, file: BinaryIO, gain: Callable[[int], None], stop: Event, patience: Patience
) -> str:
    """Make a file as long as it should be; returns its digest."""
    if os.fstat(file.fileno()).st_size > remote.size:
        file.truncate(0)
    hasher, have = remote.hasher(), 0
    file.seek(0)
    while piece := file.read(MIB):
        _ask(stop)
        hasher.update(piece)
        have += len(piece)
    gain(have)

    def more() -> None:
        nonlocal have
        for piece in _body(remote, have, patience.timeout):
            _ask(stop)
            rest = memoryview(piece)
            while rest:  # a disk may take a part only
                rest = rest[file.write(rest) :]
            hasher.update(piece)
            have += len(piece)
            gain(len(piece))
        if have < remote.size:
            raise Trouble(f"{remote.url}: cut at byte {have} of {remote.size}")

    if have < remote.size:
        patiently(more, patience, stop, lambda: have)
    return hasher.hexdigest()


def _body(remote: Remote, have: int, timeout: float) -> Iterator[bytes]:
    """What a server sends of a file from byte `have` on, as far as it goes."""
    with request(remote.url, timeout, have) as answer:
        skip = 0
        if answer.status == 206:
            _check_range(remote, answer.headers.get("Content-Range", ""), have)
        elif answer.status == 200:  # all of it, where a part was asked for too
            skip = have
            length = answer.headers.get("Content-Length")
            if length is not None and length != str(remote.size):
                raise Trouble(
                    f"{remote.url}: the server sends {length} bytes, its list says {remote.size}"
                )
        else:
            raise Trouble(f"{remote.url}: the server answers {answer.status}")
        left = remote.size - have
        while left:
            try:
                piece = answer.read1(min(MIB, skip or left))
            except (OSError, http.client.HTTPException) as error:
                raise Trouble(f"{remote.url}: {words(error)}") from None
            if not piece:
                return
            if skip:
                skip -= len(piece)
            else:
                left -= len(piece)
                yield piece


def _check_range(remote: Remote, told: str, have: int) -> None:
    """Hold what a server says to send against what was asked for."""
    span, _, total = told.removeprefix("bytes ").partition("/")
    if span.partition("-")[0] != str(have) or total not in ("*", str(remote.size)):
        raise Trouble(
            f"{remote.url}: the server sends '{told}', asked for byte {have} on of {remote.size}"
        )


def _matches(path: Path, remote: Remote, stop: Event) -> bool:
    if path.stat().st_size != remote.size:
        return False
    hasher = remote.hasher()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            _ask(stop)
            hasher.update(piece)
    return bool(hasher.hexdigest() == remote.digest)


def _ask(stop: Event) -> None:
    if stop.is_set():
        raise Stopped


def missing(remotes: Sequence[Remote], folder: Path) -> int:
    """Bytes that are still to be fetched, by the sizes of what is there."""
    left = 0
    for remote in remotes:
        final, part = folder / remote.name, remote.part(folder)
        there = final if final.exists() and final.stat().st_size == remote.size else part
        left += remote.size - (min(there.stat().st_size, remote.size) if there.exists() else 0)
    return left


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from fetching into a folder meanwhile; the lock ends with the process.

    Raises:
        DownloadError: one is fetching.
    """
    path = folder / ".download.lock"
    with path.open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DownloadError(f"another process is fetching into '{folder}'") from None
            except OSError:
                pass  # a file system without locks
        yield


def fetch_all(
    remotes: Sequence[Remote],
    folder: Path,
    told: Callable[[int], None],
    check: Callable[[Path], None],
    at_once: int = 4,
    patience: Patience | None = None,
) -> list[Path]:
    """Fetch files, several at a time; the first error, or Ctrl-C, ends all, and parts are kept.

    told: called now and then with the bytes that are here.

    Returns: where wrong files of those names were moved.

    Raises:
        DownloadError: also where the disk cannot hold them, before anything is fetched.
        UsageError: as `check` does.
    """
    patience = patience or Patience()
    need = missing(remotes, folder)
    if need > (free := shutil.disk_usage(folder).free):
        raise _full(folder, need, free)
    stop, lock, here = Event(), Lock(), [0]
    waiting, errors, moved = list(reversed(remotes)), list[BaseException](), list[Path]()

    def gain(count: int) -> None:
        with lock:
            here[0] += count

    def take() -> Remote | None:
        with lock:
            return waiting.pop() if waiting and not stop.is_set() else None

    def work() -> None:
        while (remote := take()) is not None:
            try:
                if aside := fetch(remote, folder, gain, stop, patience, check):
                    moved.append(aside)
            except Stopped:
                return
            except BaseException as error:
                errors.append(error)
                stop.set()

    # Daemons: a thread that waits for a byte would hold up the end of the process.
    threads = [Thread(target=work, daemon=True) for _ in range(min(at_once, len(remotes)))]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2 / len(threads))
            told(here[0])
    finally:
        stop.set()
        for thread in threads:
            thread.join(2.0 / len(threads))
    told(here[0])
    if errors:
        error = errors[0]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise _full(folder, missing(remotes, folder), free) from None
        if isinstance(error, OSError):
            raise DownloadError(
                f"'{error.filename or folder}': {error.strerror or error}"
            ) from None
        raise error
    return moved


def _full(folder: Path, need: int, free: int) -> DownloadError:
    return DownloadError(
        f"the disk of '{folder}' has {free / 1e9:.2f} GB free, and {need / 1e9:.2f} GB are still "
        "to be fetched: make room, ask for fewer --shards or name another --out; what was fetched "
        "is kept, run the same command again to go on"
    )
