"""No plan hangs on the order of a set: ranks of torchrun hash words each by a seed of their own."""

import os
import subprocess
import sys

import pytest

from geon.launch.local import ROOT
from tests.distributed.jobs import TINY


@pytest.mark.dist
def test_processes_that_hash_otherwise_make_one_plan():
    words = [*TINY, "mode=plan", "plan.format=json", "plan.world_size=4"]
    words += ["parallel=fsdp", "optim=hybrid", "data.batch_tokens=4096"]
    plans = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        plans.add(done.stdout)
    assert len(plans) == 1 and '"owner"' in plans.pop()
