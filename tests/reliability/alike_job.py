"""Started by torchrun: rank 1 differs from rank 0 in one thing after the other."""

import json
import os
import sys
from pathlib import Path

import torch

from geon.engine import agreement, main
from geon.engine.lock import Lock
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import read_env
from geon.launch.leave import leave
from tests.reliability.identity_job import TINY

LAYOUT = ["parallel=ddp", "data.batch_tokens=128"]
ODD = {
    "rate": ["optim.lr=0.5"],
    "data": ["data.tokens=5000"],
    "precision": ["parallel.precision=bf16"],
    "seed": ["seed=9"],
    "batch": ["data.batch_tokens=256"],
}


def told(output, odd, env):
    """What a rank is told by a job whose rank 1 got other overrides."""
    mine = ODD.get(odd, []) if env.rank == 1 else []
    config = compose([*TINY, *LAYOUT, *mine, f"output={output}", f"name={odd}"])
    if odd == "version" and env.rank == 1:
        agreement.torch.__version__ = "1.0"
    try:
        if odd == "none":
            main.execute(config, env)
        else:  # without the watch, whose word in the store would end the next job
            checked = main.check_alone(config, env)
            main.begin(config, checked, main.start(config.parallel, "cpu", env), Lock())
    except UsageError as error:
        return str(error)
    finally:
        agreement.torch.__version__ = version
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    return "trained"


if __name__ == "__main__":
    torch.set_num_threads(1)
    version = torch.__version__
    start, parallel = main.start, []

    def once(*arguments):
        """Join the process group at the first job only: a program has one."""
        parallel[:] = parallel or [start(*arguments)]
        return parallel[0]

    main.start = once
    output, env = Path(sys.argv[1]), read_env()
    found = {odd: told(output, odd, env) for odd in (*ODD, "version", "none")}
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    leave(0)
