"""Run by two ranks: what both of them hear when one of them cannot save."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine import hashing, integrity, writing
from geon.engine.checkpointer import Staging
from geon.engine.parallel import start
from geon.errors import SaveError
from geon.launch.env import read_env
from geon.launch.leave import leave
from tests.reliability.checkpoints_job import tensors


def main() -> None:
    root = Path(sys.argv[1])
    parallel = start(ParallelConfig(layout=Layouts.ddp, timeout_seconds=60), "cpu", read_env())
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    rank, heard = parallel.env.rank, []

    def save(step: int, value: float = 1.0) -> None:
        cut = distribute_tensor(torch.arange(10.0), parallel.mesh, [Shard(0)])
        held = {"a": torch.full((1000,), value), "b": torch.ones(3), "cut": cut}
        peers = writing.Peers(parallel, group)
        facts = {"model": {"arch": "gpt"}}
        try:
            writing.save(root, step, Staging().copy(held), facts, 2, peers)
            heard.append("saved")
        except (SaveError, FloatingPointError) as error:
            heard.append(f"{type(error).__name__}: {error}")

    save(1)
    save(2, float("nan") if rank == 1 else 1.0)
    real = hashing._Stream.write

    def full(self, data):
        if rank == 1:
            self._disk.error = OSError(28, "No space left on device")
            raise self._disk.error
        return real(self, data)

    hashing._Stream.write = full
    save(3)
    hashing._Stream.write = real
    save(4)
    found = parallel.gather(heard)
    if parallel.env.main:
        left = sorted(p.name for p in root.iterdir())
        sound = [integrity.sound(p) for p in root.glob("step-*")]
        cut = tensors(root)["cut"].tolist()
        told = {"heard": found, "left": left, "sound": sound, "cut": cut}
        print(json.dumps(told), flush=True)
    parallel.barrier()
    leave(0)


if __name__ == "__main__":
    main()
