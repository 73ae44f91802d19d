"""Reading ahead: the order of `Batches`, errors of the thread, and its end."""

import threading

import numpy as np
import pytest
import torch

from geon.data import Batches, Loader, Split

CPU = torch.device("cpu")


def batches(split=None):
    tokens = np.random.default_rng(0).integers(0, 60_000, 4001).astype(np.uint16)
    return Batches(split or Split("draws", [tokens]), 8, 12, 1, 2, 4, seed=5)


def reading():
    return [one for one in threading.enumerate() if one.name.startswith("loader")]


@pytest.mark.parametrize("ahead", [None, True])
def test_any_step_is_read_as_without_a_loader(ahead):
    plain, loader = batches(), Loader(batches(), CPU, ahead)
    for step in (0, 1, 2, 7, 8, 3, 3):  # on, a resume elsewhere, back
        found = loader.step(step)
        for (x, y), (inputs, targets) in zip(plain.step(step), found, strict=True):
            assert inputs.dtype == targets.dtype == torch.int64
            assert torch.equal(x, inputs) and torch.equal(y, targets)
    assert bool(reading()) is bool(ahead)
    loader.close()
    assert not reading()


def test_the_next_step_is_read_meanwhile():
    loader, asked = Loader(source := batches(), CPU, ahead=True), []
    read = source.windows_at
    object.__setattr__(source, "windows_at", lambda step: asked.append(step) or read(step))
    loader.step(4)
    loader._next[1].result()  # what the thread does with nobody asking
    assert asked == [4, 5]
    loader.step(5)
    loader.close()
    assert asked.count(5) == 1


def test_what_fails_in_the_thread_fails_where_its_step_is_asked_for():
    class Torn(Split):
        def window(self, start, length):
            if threading.current_thread().name.startswith("loader") and self.torn:
                raise OSError("disk is gone")
            return super().window(start, length)

    split = Torn("torn", [np.arange(4001, dtype=np.uint16)])
    split.torn = False
    loader = Loader(batches(split), CPU, ahead=True)
    loader.step(0)
    loader.step(1)
    split.torn = True
    with pytest.raises(OSError, match="disk is gone"):
        for step in (2, 3):  # 2 may have been read before
            loader.step(step)
    loader.close()
    assert not reading()
