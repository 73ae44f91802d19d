"""Devices of ranks, on machines with any number of GPUs: none is asked for here."""

import ctypes

import pytest
import torch

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine import devices
from geon.engine.parallel import start
from geon.errors import UsageError
from geon.launch.env import Env

SHARED = ParallelConfig(Layouts.ddp, share_gpu=True)
FOUR = Env(rank=3, world=4, local_rank=3, launched=True, local_world=4)


class Library:
    """A libnccl that says its version."""

    def __init__(self, number):
        self.number = number

    def ncclGetVersion(self, pointer):
        pointer._obj.value = self.number
        return 0


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(23007))
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    return monkeypatch


def test_ranks_beyond_the_gpus_begin_again(two_gpus):
    assert [devices.pick_device("cuda", r, True).index for r in range(5)] == [0, 1, 0, 1, 0]
    assert devices.pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="parallel.share_gpu=true or device=cpu"):
        devices.pick_device("cuda", 2)
    two_gpus.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="this machine has 0"):
        devices.pick_device("cuda", 0, True)


def test_nccl_is_told_to_share(two_gpus):
    import os

    devices.share_gpus(SHARED, torch.device("cuda", 1), FOUR)
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    two_gpus.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")  # what the user sets stays
    devices.share_gpus(SHARED, torch.device("cuda", 1), FOUR)
    assert os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] == "0"


@pytest.mark.parametrize(
    ("local_world", "layout", "number", "words"),
    [
        (2, Layouts.ddp, 23007, "2 ranks on a node with 2 GPUs have one each"),
        (1, Layouts.single, 23007, "has no effect"),
        (4, Layouts.deepspeed, 23007, "DeepSpeed gives local rank n"),
        (4, Layouts.ddp, 22807, "the one loaded is 2.28.7"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(two_gpus, local_world, layout, number, words):
    two_gpus.setattr(ctypes, "CDLL", lambda name: Library(number))
    env = Env(0, local_world, 0, True, local_world=local_world)
    with pytest.raises(UsageError, match=words):
        devices.share_gpus(ParallelConfig(layout, share_gpu=True), torch.device("cuda", 0), env)


def test_a_cpu_has_nothing_to_share():
    with pytest.raises(UsageError, match="no effect with device=cpu"):
        start(SHARED, "cpu", FOUR)


def test_without_a_library_there_is_no_version(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.nccl_version() == ()
