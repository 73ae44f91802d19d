"""Which device a rank has, whether several may share one, and what it computes in."""

import ctypes

import torch

from geon.configs.schema import Layouts, ParallelConfig, Precision
from geon.engine.metrics import bf16_instructions
from geon.errors import UsageError
from geon.launch.env import Env, default

SHARING_NCCL = (2, 30)
"""The first NCCL that takes several ranks on one GPU."""


def pick_device(name: str, local_rank: int, share: bool = False) -> torch.device:
    """Device of this rank. share: ranks beyond the GPUs begin with the first one again.

    Raises:
        UsageError: a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not one of auto, cpu, cuda")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count and not (share and count):
        raise UsageError(
            f"device=cuda: local rank {local_rank} needs GPU {local_rank}, this machine has "
            f"{count}; use fewer ranks per node, parallel.share_gpu=true or device=cpu"
        )
    return torch.device("cuda", local_rank % count)


def share_gpus(config: ParallelConfig, place: torch.device, env: Env) -> None:
    """Let ranks share GPUs, as parallel.share_gpu=true asks; before the process group is made.

    Raises:
        UsageError: where that has no effect, or cannot work.
    """
    if place.type != "cuda":
        raise UsageError(
            "parallel.share_gpu=true has no effect with device=cpu, where ranks share the cores "
            "anyway: leave it out"
        )
    count = torch.cuda.device_count()
    if env.local_world <= count:
        raise UsageError(
            f"parallel.share_gpu=true has no effect: {env.local_world} ranks on a node with "
            f"{count} GPUs have one each; leave it out"
        )
    if config.layout is Layouts.deepspeed:
        raise UsageError(
            "parallel.share_gpu=true: DeepSpeed gives local rank n the GPU n; take another layout "
            "or fewer ranks per node"
        )
    _let_nccl_share()


def rank_device(name: str, env: Env) -> torch.device:
    """Device of this rank of a bench or a test, made current; ranks share GPUs where they must.

    Raises:
        UsageError: a device that this machine does not have, or an NCCL too old to share one.
    """
    place = pick_device(name, env.local_rank, share=True)
    if place.type == "cuda":
        if env.local_world > torch.cuda.device_count():
            _let_nccl_share()
        torch.cuda.set_device(place)
    return place


def _let_nccl_share() -> None:
    found = nccl_version()
    if found < SHARING_NCCL:
        told = ".".join(map(str, found)) or "not to be found"
        raise UsageError(
            "several ranks on a GPU (parallel.share_gpu) need NCCL 2.30, and the one loaded is "
            f"{told}: docs/distributed.md says how to load another, or use fewer ranks per node"
        )
    default("NCCL_MULTI_RANK_GPU_ENABLE", "1")


def nccl_version() -> tuple[int, ...]:
    """Version of the NCCL that this process has loaded; () without one.

    `torch.cuda.nccl.version()` names the one that torch was compiled with, which a preloaded
    library replaces. It is the answer only where NCCL is linked into torch itself.
    """
    number = ctypes.c_int()
    try:
        # By its soname: the loader gives the library that is loaded already, preloaded or torch's.
        failed = ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        built_in = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        return tuple(torch.cuda.nccl.version())[:3] if built_in else ()
    major, rest = divmod(number.value, 10000)
    return () if failed else (major, *divmod(rest, 100))


def arithmetic(precision: Precision, device: str) -> torch.dtype:
    """Data type of the model's arithmetic on a kind of device."""
    half = precision is Precision.bf16 or (device == "cuda" and precision is not Precision.fp32)
    if precision is Precision.native and device == "cpu":
        half = bf16_instructions()
    return torch.bfloat16 if half else torch.float32
