"""A real run whose rank 1, or all of whose ranks, do what they should not at a step."""

import sys
import time

from geon.engine import main as engine
from geon.engine.trainer import Callback
from geon.launch import signals
from geon.launch.compose import compose
from geon.launch.env import read_env
from geon.launch.leave import guard, leave


class Fault(Callback):
    def __init__(self, kind, step):
        self.kind, self.step = kind, step

    def before_update(self, trainer):
        rank = trainer.run.parallel.env.rank
        if trainer.step + 1 != self.step:
            return
        if self.kind == "sleeps" and rank == 1 or self.kind == "all sleep":
            print(f"fault at {time.time()}", flush=True)
            time.sleep(300)
        if self.kind == "raises" and rank == 1:
            print(f"fault at {time.time()}", flush=True)
            raise ValueError("a fault of this rank alone")


if __name__ == "__main__":
    signals.die_with_parent()
    signals.listen()
    kind, step, *overrides = sys.argv[1:]
    made = engine._callbacks
    engine._callbacks = lambda config: [Fault(kind, int(step)), *made(config)]
    leave(guard(lambda: engine.execute(compose(overrides), read_env())))
