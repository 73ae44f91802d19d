"""Reading tensors of a checkpoint without running anything that a file says."""

import pickle
import stat
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from geon.engine.integrity import METADATA, Refused, plain_name

_CLASSES = (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
    TensorProperties,
    ChunkStorageMetadata,
    StorageMeta,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
)
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
)


def _layout(name: str) -> torch.layout:
    """Stands in for torch.serialization._get_layout: only dense tensors are saved."""
    if name != "torch.strided":
        raise Refused(f"'{METADATA}' holds a tensor of layout {name[:40]!r}")
    return torch.strided


def _path(*parts: Any) -> str:
    """Stands in for pathlib's paths: where the checkpoint was written is not used."""
    return "/".join(map(str, parts))


def _member(kind: Any, name: Any) -> Any:
    """Stands in for getattr, by which Python before 3.11.4 pickles the member of an enum."""
    if kind is not _MEM_FORMAT_ENCODING or str(name) not in kind.__members__:
        raise Refused(f"'{METADATA}' asks for an attribute, {str(name)[:40]!r}: it was not run")
    return kind[str(name)]


ALLOWED: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): cls for cls in _CLASSES},
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "getattr"): _member,
    **{(m, "PosixPath"): _path for m in ("pathlib", "pathlib._local")},
}
"""All that a `.metadata` file may name, and what it gets. Nothing here has a side effect."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in ALLOWED."""
        if (module, name) not in ALLOWED:
            raise Refused(
                f"'{METADATA}' names {module}.{name}, which no checkpoint of tensors needs: it was "
                "not run"
            )
        return ALLOWED[module, name]


class TensorReader(FileSystemReader):
    """Reads tensors, and nothing else, from the files of one folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path
        self._index: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Index of the tensors; read once.

        Raises:
            Refused: it names a class that is not in ALLOWED, holds something besides tensors, or
                points out of the folder.
        """
        if self._index is None:
            try:
                with (self._folder / METADATA).open("rb") as file:
                    index = _Unpickler(file).load()
                self._check(index)
            except (Refused, OSError):
                raise
            except Exception as error:  # whatever bytes make of an unpickler
                reason = f"{type(error).__name__}: {str(error)[:120]}"
                raise Refused(f"'{METADATA}' cannot be read ({reason})") from None
            index.storage_meta = StorageMeta(load_id=self.load_id)
            self._index = index
        return self._index

    def _check(self, index: Any) -> None:
        if not isinstance(index, Metadata) or not isinstance(index.state_dict_metadata, dict):
            raise Refused(f"'{METADATA}' holds no index of tensors")
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or not isinstance(name, str):
                raise Refused(f"'{METADATA}' holds '{name}', which is no tensor")
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise Refused(f"'{METADATA}' gives no dtype of '{name}'")
            boxes = [entry.size, *(s for c in entry.chunks for s in (c.offsets, c.sizes))]
            if not all(isinstance(b, torch.Size) and min(b, default=0) >= 0 for b in boxes):
                raise Refused(f"'{METADATA}' gives no shape of '{name}'")
        sizes: dict[str, int] = {}
        for key, place in index.storage_data.items():
            self._check_place(key, place, sizes)
        held = {(key.fqn, key.offset) for key in index.storage_data}
        for name, entry in index.state_dict_metadata.items():
            for chunk in entry.chunks:
                if (name, chunk.offsets) not in held:
                    raise Refused(f"'{METADATA}' does not say where '{name}' is")

    def _check_place(self, key: Any, place: Any, sizes: dict[str, int]) -> None:
        if not isinstance(key, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise Refused(f"'{METADATA}' holds no index of files")
        file, numbers = place.relative_path, (place.offset, place.length)
        if not plain_name(file):
            raise Refused(f"'{METADATA}' points to {str(file)[:80]!r}, out of the folder")
        if place.transform_descriptors:
            raise Refused(f"'{METADATA}' wants '{file}' transformed, which is not done")
        if file not in sizes:
            found = (self._folder / file).lstat()
            if not stat.S_ISREG(found.st_mode):
                raise Refused(f"'{file}' is a link or no plain file")
            sizes[file] = found.st_size
        if not all(type(n) is int and n >= 0 for n in numbers) or sum(numbers) > sizes[file]:
            raise Refused(f"'{file}' ends before '{key.fqn}', which '{METADATA}' says is in it")
