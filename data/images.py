"""Images and their classes: batches of them, and CIFAR-10's own files.

A record is a class and 3 x 32 x 32 bytes of pixels, as in CIFAR-10's binary files. To the trainer
an image is a sequence of one prediction, so what counts tokens counts images here.
"""

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geon.data.corpus import Corpus, Split
from geon.data.order import Batches, sample_index
from geon.errors import UsageError, shown

SHAPE = (3, 32, 32)
"""Channels, rows and columns of every image."""
RECORD = 1 + 3 * 32 * 32


class ImageSplit(Split):
    """Records of images, read by number.

    records: (n, 1 + 3 x 32 x 32) uint8, the class first.
    """

    def __init__(self, name: str, records: np.ndarray) -> None:
        super().__init__(name, [records])
        self.records = records

    def windows(self, context: int) -> int:
        """Images; each is a window of its own."""
        return len(self.records)


@dataclass(frozen=True)
class ImageBatches(Batches):
    """Batches of images for one rank, in the order in which `Batches` reads windows."""

    def windows_at(self, step: int) -> Tensor:
        """Records of this rank at `step`: (sequences / world, 1 + pixels) uint8."""
        assert isinstance(self.split, ImageSplit)
        share = self.sequences // self.world
        first = self.first(step) + self.rank * share
        index = sample_index(self.seed, first, share, self.windows, self.shuffle)
        return torch.from_numpy(self.split.records[index])

    def pairs(self, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches of records: pixels (micro, 3, 32, 32) in [-1, 1], classes (micro, 1)."""
        return [opened(part) for part in windows.split(self.micro)]


def opened(records: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 32, 32) in [-1, 1] and classes (n, 1) int64 of records."""
    pixels = records[:, 1:].float().div_(127.5).sub_(1.0)
    return pixels.view(-1, *SHAPE), records[:, :1].long()


def image_corpus(train: np.ndarray, test: np.ndarray, classes: int, name: str) -> Corpus:
    """A corpus of records."""
    digest = hashlib.sha256(train.tobytes() + test.tobytes()).hexdigest()
    return Corpus(
        train=ImageSplit(f"training images of {name}", train),
        val=ImageSplit(f"test images of {name}", test),
        vocab_size=classes,
        codec=None,
        val_text=b"",
        facts={
            "name": name,
            "train_images": len(train),
            "test_images": len(test),
            "classes": classes,
            "sha256": digest,
        },
    )


TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"


def cifar_corpus(path: str) -> Corpus:
    """CIFAR-10 from a folder of its own files: the Python version, or the binary one (.bin).

    Raises:
        UsageError: a file that is missing, or is none of these.
    """
    folder = Path(path)
    binary = (folder / f"{TEST}.bin").is_file()
    ending, read = (".bin", _binary) if binary else ("", _python)
    files = [folder / f"{name}{ending}" for name in (*TRAIN, TEST)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"data.path '{shown(path)}' lacks {', '.join(missing)}: data=images reads a folder "
            "with the files of CIFAR-10, Python or binary version; without data.path it draws "
            "glyphs"
        )
    *train, test = (_read(file, read) for file in files)
    return image_corpus(np.concatenate(train), test, 10, "CIFAR-10")


def _read(file: Path, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    records = read(file)
    if not len(records) or records[:, 0].max() > 9:
        raise UsageError(f"'{file}' is no batch of CIFAR-10: its classes are not 0 to 9")
    return records


def _binary(file: Path) -> np.ndarray:
    content = np.fromfile(file, np.uint8)
    if len(content) % RECORD:
        raise UsageError(
            f"'{file}' has {len(content)} bytes, which are no records of {RECORD}: it is no binary "
            "batch of CIFAR-10"
        )
    return content.reshape(-1, RECORD)


_ARRAY = np.zeros(1).__reduce__()[0]
_KNOWN: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _ARRAY for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, kind: text.encode(kind),
}


class _Arrays(pickle.Unpickler):
    """Reads dicts, lists and arrays; whatever else a pickle would call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve what an array is made by."""
        if (found := _KNOWN.get((module, name))) is None:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which is not read")
        return found


def _python(file: Path) -> np.ndarray:
    try:
        content = _Arrays(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        pixels, classes = content[b"data"], content[b"labels"]
        labels = np.asarray(classes, np.int64)
    except Exception as error:  # a broken pickle raises anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UsageError(f"'{file}' is no Python batch of CIFAR-10: {reason}") from None
    fits = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not fits or pixels.shape != (len(labels), RECORD - 1) or labels.ndim != 1:
        told = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels)
        raise UsageError(
            f"'{file}' is no Python batch of CIFAR-10: its data are {told}, with {len(labels)} "
            f"labels; uint8 (labels, {RECORD - 1}) is needed"
        )
    return np.concatenate([labels.clip(0, 255).astype(np.uint8)[:, None], pixels], axis=1)
