"""Files of a checkpoint that are hashed as they are written, by several threads."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

_THREADS = 4
"""Files that a rank writes at a time."""


class _Stream:
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, path: Path, disk: "_Disk") -> None:
        self._file, self._disk, self._sha256 = path.open("wb"), disk, hashlib.sha256()
        self._name, self._size = path.name, 0

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:  # torch's writer tells it as "unexpected pos"
            self._disk.error = self._disk.error or error
            raise
        self._sha256.update(data)
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._disk.error = self._disk.error or error
            raise

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            entry = {"size": self._size, "sha256": self._sha256.hexdigest()}
            self._disk.files[self._name] = entry


class _Disk(FileSystem):
    """The file system of torch.distributed.checkpoint, which notes hashes and errors.

    Attributes:
        files: size and SHA-256 of each file that was written, by name.
        error: the first error of the operating system.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file; one to write is hashed."""
        if "w" not in mode:
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        stream = _Stream(Path(path), self)
        try:
            yield stream
        finally:
            stream.close()

    def rename(self, path: Any, new_path: Any) -> None:
        """Rename a file, and what is known of it."""
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """Writes a rank's tensors by several threads, a file each, and knows the files' digests."""

    def __init__(self, path: Path) -> None:
        # No copies ahead: torch's loader that makes them is slow beside another one.
        super().__init__(path, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
        self.fs = self.disk = _Disk()

    def write_data(self, plan: Any, planner: Any) -> Any:
        """Write the items of a plan, the largest first, each to the thread that has least."""
        threads = max(1, min(_THREADS, os.cpu_count() or 1, len(plan.items)))
        parts: list[list[Any]] = [[] for _ in range(threads)]
        sizes = [0] * threads
        for item in sorted(plan.items, key=_bytes_of, reverse=True):
            least = sizes.index(min(sizes))
            parts[least].append(item)
            sizes[least] += _bytes_of(item)
        prefix = plan.storage_data
        one = super().write_data

        def write(k: int) -> Any:
            named = dataclasses.replace(prefix, prefix=f"{prefix.prefix}{k}_")
            part = dataclasses.replace(plan, items=parts[k], storage_data=named)
            return one(part, planner).wait()

        # SHA-256 stands for the check sums of torch's zip files, which take half of the time.
        checked = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with ThreadPoolExecutor(threads) as pool:
                results = [result for found in pool.map(write, range(threads)) for result in found]
        finally:
            torch.serialization.set_crc32_options(checked)
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(results)
        return done


def _bytes_of(item: Any) -> int:
    data = item.tensor_data
    return int(data.size.numel() * torch.empty((), dtype=data.properties.dtype).element_size())
