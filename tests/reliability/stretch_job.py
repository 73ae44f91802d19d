"""Train, and note which windows each step reads; may kill itself.

Arguments: the file to note in, the step whose batch the last rank dies of (0: none), overrides.
"""

import json
import os
import signal
import sys

import torch

from geon.data import Loader
from geon.engine.main import execute
from geon.launch.compose import compose
from geon.launch.env import read_env
from geon.launch.leave import guard, leave

NOTES, DIES, *OVERRIDES = sys.argv[1:]
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

_step = Loader.step


def step(self, number):
    micros = _step(self, number)
    first = torch.cat([inputs[:, 0] for inputs, _ in micros]).tolist()
    with open(NOTES, "a") as notes:  # noqa: PTH123 - one line, appended whole
        notes.write(json.dumps([number, RANK, WORLD, first]) + "\n")
    if number == int(DIES) and number and RANK == WORLD - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return micros


if __name__ == "__main__":
    torch.set_num_threads(1)
    Loader.step = step
    leave(guard(lambda: execute(compose(OVERRIDES), read_env())))
