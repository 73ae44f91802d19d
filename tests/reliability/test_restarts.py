"""torchrun's restarts: each attempt meets in a place of its own, without a variable."""

import os
import re
import subprocess
import sys
import threading
import uuid
from datetime import timedelta

import pytest
import torch.distributed as dist

from geon.engine import rendezvous
from geon.errors import RankLost
from geon.launch.local import ROOT, torchrun_command


def come_together(restarts):
    """Both ranks of the init-only job come together in the first attempt and each restart."""
    program = ROOT / "tests" / "reliability" / "init_job.py"
    command = torchrun_command(2, [], program)
    command.insert(4, f"--max-restarts={restarts}")
    env = {k: v for k, v in os.environ.items() if "SHARE_RDZV" not in k}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30 + 20 * restarts,
        env={**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    came = re.findall(r"attempt (\d+) rank (\d) sum 2", done.stdout)
    assert done.returncode == 1, done.stderr
    together = sorted({int(a) for a, _ in came if {(a, "0"), (a, "1")} <= set(came)})
    assert together == list(range(restarts + 1)), done.stdout + done.stderr


@pytest.mark.dist
@pytest.mark.row("R06")
def test_restarted_ranks_find_each_other():
    """By torch's own way the first restart fails here most of the time (2 of 10 came together)."""
    come_together(2)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.row("R06")
def test_ten_restarts_in_a_row():
    come_together(10)


def answer(store, rank, into):
    into[rank] = rendezvous._answer(store, rank, 5)


@pytest.mark.row("R06")
def test_a_name_is_drawn_anew_and_dead_forerunners_are_not_counted():
    """Three ranks meet twice in one store; a rank 1 of an attempt between them died early."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    names = []
    for attempt in range(2):
        store.set("geon-here-1", uuid.uuid4().hex)  # said by one that is dead by now
        store.set("exception_dump", "1")
        found = {}
        threads = [threading.Thread(target=answer, args=(store, r, found)) for r in (1, 2)]
        timers = [threading.Timer(0.1 + attempt * 0.1, thread.start) for thread in threads]
        for timer in timers:
            timer.start()
        names.append(rendezvous._call(store, 3, 5))
        for timer, thread in zip(timers, threads, strict=True):
            timer.join()
            thread.join()
        assert set(found.values()) == {names[-1]} and set(found) == {1, 2}
        assert not store.check(["exception_dump"])
    assert names[0] != names[1]


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    with pytest.raises(RankLost, match="rank 1, 2 of 3 did not come within .*=0.2"):
        rendezvous._call(store, 3, 0.2)
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RankLost, match="rank 1: rank 0 did not come"):
        rendezvous._answer(store, 1, 0.2)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.row("R33")
def test_random_kills_change_nothing(tmp_path):
    """Six kills, during saves too; what is left is bitwise what a calm run leaves."""
    command = [sys.executable, "-m", "geon.benches.chaos", "--kills=6", "--steps=150", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"final_hash_equal": true' in done.stdout
    assert '"survived": 6' in done.stdout
