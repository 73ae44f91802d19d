"""Small real training jobs through the launcher, and what they leave."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from geon.engine import checkpoint
from geon.engine.devices import SHARING_NCCL, nccl_version
from geon.launch import local
from geon.launch.local import SIGNALS
from geon.models import MODELS, ModelShape
from tests import warm

TINY = [
    "data=synthetic",
    "data.tokens=60000",
    "data.vocab_size=64",
    "data.val_tokens=2048",
    "data.batch_tokens=2048",
    "model.n_layer=2",
    "model.n_head=2",
    "model.d_model=32",
    "model.context=64",
    "schedule.steps=20",
    "checkpoint.every=0",
    "device=cpu",
]

STIEFEL = [
    "optim=hybrid",
    "optim.overrides.qk=null",
    "optim.hidden.manifold=stiefel",
    "optim.hidden.radius=2",
    "optim.hidden.lr_scale=0.5",
    "optim.hidden.even_rows=false",
    "optim.hidden.weight_decay=0",
]
"""Manifold Muon for every hidden matrix, beside the hybrid's embedding and head."""


EXACT = ["parallel.precision=fp32", "optim.polar.dtype=fp32"]
"""Every product in fp32 on any device, so that a GPU can be held against one process; several ranks
need shard.wire=fp32 besides."""


def needs_gpu_ranks(ranks: int) -> pytest.MarkDecorator:
    """Skip without that many GPUs, or one that NCCL lets them share."""
    enough = torch.cuda.is_available() and (
        torch.cuda.device_count() >= ranks or nccl_version() >= SHARING_NCCL
    )
    return pytest.mark.skipif(
        not enough, reason=f"needs {ranks} GPUs, or one and NCCL 2.30 (docs/distributed.md)"
    )


def on_device(device: str, ranks: int) -> list[str]:
    """Options of a job on a device, which ranks share where they must."""
    share = device == "cuda" and 0 < torch.cuda.device_count() < ranks
    return [f"device={device}", f"parallel.share_gpu={str(share).lower()}"]


def train(output: Path, name: str, ranks: int, *arguments: str, ok: bool = True):
    """Run a job; returns its run folder, or the completed process when `ok` is false."""
    other = {"data=text", "data=bins", "data=stdlib"} & set(arguments)  # data.tokens is not theirs
    tiny = [text for text in TINY if not (other and text.startswith("data.tokens="))]
    command = [*tiny, f"output={output}", f"name={name}", *arguments]
    if "device=cuda" in arguments:
        done = local.run(ranks, command, threads=1, timeout=240)
    else:
        told = ranks if ranks > 1 else 0
        done = warm.run(told, local.ROOT / "train.py", command, timeout=240)
    if not ok:
        return done
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return output / name


def launch(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    """Run a program of the tests, one thread a rank; torchrun's are forked (tests/warm.py)."""
    if command[1:4] == ["-m", "torch.distributed.run", "--standalone"] and command[5] == SIGNALS:
        ranks, program, arguments = int(command[4].partition("=")[2]), command[6], command[7:]
        if not any("cuda" in word for word in arguments):
            return warm.run(ranks, program, arguments, timeout=timeout)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(local.ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=env
    )


def by_rank(ranks: int, program: str, arguments, timeout: float) -> list:
    """What each rank of a program in this folder found, as rank 0 prints it in its last line."""
    command = local.torchrun_command(ranks, arguments, Path(__file__).parent / program)
    done = launch(command, timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == ranks
    return found


def by_file(ranks: int, program: Path, folder: Path, timeout: float = 150) -> list:
    """What each rank of a program found: it leaves <rank>.json in the folder it is given."""
    done = launch(local.torchrun_command(ranks, [str(folder)], program), timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a run's newest checkpoint, read by one process."""
    found = checkpoint.find(folder)
    shape = dict(checkpoint.read_commit(found)["model"])
    model = MODELS[shape.pop("arch")](ModelShape(**shape))
    checkpoint.load_weights(found, model)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative Frobenius distance over the parameters."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a)


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def metrics(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]
