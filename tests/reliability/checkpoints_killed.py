"""Saves step 1, and kills itself after so many bytes of step 2."""

import os
import signal
import sys
from pathlib import Path

import torch

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine import hashing
from geon.engine.parallel import Parallel
from geon.engine.writing import Peers, save
from geon.launch.env import Env


def main() -> None:
    root, most = Path(sys.argv[1]), int(sys.argv[2])
    peers = Peers(Parallel(ParallelConfig(layout=Layouts.single), Env(), torch.device("cpu")))
    held = {f"w{i}": torch.full((1000,), 1.0) for i in range(20)}
    save(root, 1, held, {"model": {"arch": "gpt"}}, 2, peers)
    real, written = hashing._Stream.write, [0]

    def dying(self, data):
        done = real(self, data)
        written[0] += done
        if written[0] >= most:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    hashing._Stream.write = dying
    save(root, 2, held, {"model": {"arch": "gpt"}}, 2, peers)


if __name__ == "__main__":
    main()
