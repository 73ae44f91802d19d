"""Ranks that are gone or stuck: who, where, in which step and collective, and how soon."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from geon.benches.chaos import ranks_of
from geon.engine.watch import SILENT, Watch
from geon.errors import ExchangeError, OutOfMemory, Preempted, RankLost
from geon.launch.env import Env
from geon.launch.local import ROOT, torchrun_command
from tests.reliability.test_preemption import TINY


def watch(store, rank=0, world=2, step=5, phase="backward"):
    env = Env(rank, world, rank, launched=True, local_world=world)
    cpu = torch.device("cpu")
    config = SimpleNamespace(timeout_seconds=4.0)
    found = {"env": env, "store": store, "phase": phase, "entries": 0, "device": cpu}
    one = Watch(SimpleNamespace(config=config, **found))
    one.follow(SimpleNamespace(step=step))
    return one


@pytest.fixture
def store():
    return dist.HashStore()


def word(store, rank, **changed):
    """What another rank has said."""
    other = watch(store, rank)
    other._say()
    said = json.loads(store.get(f"watch-{rank}"))
    store.set(f"watch-{rank}", json.dumps(said | {"host": "far"} | changed))


def gone_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def failing(message="Connection closed by peer [::1]:9. This is typically caused by"):
    raise RuntimeError(f"[gloo/transport/tcp/pair.cc:537] {message}")


@pytest.mark.row("R05")
def test_a_process_that_is_gone_is_named_at_once(store):
    word(store, 1, pid=gone_pid(), step=4, phase="update")
    begin = time.monotonic()
    with pytest.raises(RankLost) as told, watch(store):
        failing()
    assert time.monotonic() - begin < 1
    own = re.escape(os.uname().nodename)
    assert re.match(
        rf"rank 0 on {own} at step 6, backward: a collective failed: rank 1 on far is gone "
        rf"\(pid \d+, last seen at step 4, update\)\. It raised: .*Connection closed by peer",
        str(told.value),
    )


@pytest.mark.row("R16")
def test_one_on_another_machine_that_says_nothing_any_more_is_named(store):
    word(store, 1, place="another machine", pid=1)
    begin = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 on far does not answer"), watch(store):
        failing()
    assert SILENT <= time.monotonic() - begin < SILENT + 1


@pytest.mark.row("R16")
def test_where_all_are_alive_those_that_lag_behind_are_named(store):
    word(store, 1, step=6, phase="backward")
    word(store, 2, step=6, phase="forward", at="in nap (job.py:7)", idle=9)

    def speak():
        for rank in (1, 2):
            said = json.loads(store.get(f"watch-{rank}"))
            store.set(f"watch-{rank}", json.dumps(said | {"words": 99}))

    with pytest.raises(RankLost) as told, watch(store, world=3):
        threading.Timer(0.5, speak).start()  # after the first look, as their threads would
        failing("Timed out waiting 4000ms for send operation")
    assert "no rank is gone. rank 2 on far stands at step 6, forward for 9 s, in nap" in str(
        told.value
    )
    assert "rank 1" not in str(told.value)


def test_what_one_rank_has_found_the_others_repeat(store):
    word(store, 1)
    store.set("watch-lost", "rank 7 on far is gone")
    with pytest.raises(RankLost, match="rank 7 on far is gone"), watch(store):
        raise ExchangeError("the sum of bucket 3 failed")


def test_other_errors_pass_and_are_told_to_the_others(store):
    with pytest.raises(ValueError, match="not a collective"), watch(store):
        raise ValueError("not a collective")
    assert b"failed: ValueError: not a collective" in store.get("watch-lost")


def test_a_run_that_saves_and_leaves_is_no_failure(store):
    with pytest.raises(Preempted), watch(store):
        raise Preempted("asked to stop")
    assert not store.check(["watch-lost"])
    assert json.loads(store.get("watch-0"))["end"] == "finished"


def test_what_became_another_error_on_purpose_is_that_error(store):
    """Memory that ran out in a collective is no lost rank."""
    with pytest.raises(OutOfMemory), watch(store):
        try:
            failing()
        except RuntimeError:
            raise OutOfMemory("in the exchange") from None


def test_a_gpu_says_where_all_stand_before_nccl_ends_it(store, monkeypatch, capfd):
    """NCCL's own thread aborts the process at the timeout; 4 s here, said a second after none."""
    monkeypatch.setattr("geon.engine.watch.TICK", 0.02)
    word(store, 1, step=6, phase="forward", at="in nap (job.py:7)", idle=9)
    one = watch(store)
    one._nccl = True
    with one:
        time.sleep(0.3)
    said = capfd.readouterr().err
    assert said.count("rank 1 on far stands at step 6, forward for 9 s, in nap (job.py:7)") == 1


def test_one_process_needs_no_store():
    with watch(None, world=1):
        pass


def job(output, kind, step, timeout, ranks, *more):
    """Lines of a faulty run with the seconds since the fault, and torchrun's exit status."""
    program = ROOT / "tests" / "reliability" / "watch_job.py"
    options = [f"output={output}", "name=run", f"parallel.timeout_seconds={timeout}"]
    options += ["logger.every=1", "logger.progress=true", "schedule.steps=3000", *more]
    process = subprocess.Popen(
        torchrun_command(ranks, [kind, str(step), *TINY, *options], program),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    begin, told = None, []
    for line in process.stdout:
        if found := re.match(r"fault at ([\d.]+)", line):
            begin = begin or float(found[1])
        elif begin is None and line.startswith(f"step {step}:") and kind.startswith("SIG"):
            begin = time.time()
            victim = next(p for p in ranks_of(process.pid) if rank_of(p) == 1)
            os.kill(victim, getattr(signal, kind))
        elif begin is not None and line.startswith("geon: error: rank"):
            told.append((time.time() - begin, line))
    return told, process.wait(timeout=60)


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(v for v in variables if v.startswith(b"RANK="))[5:])


LAYOUTS = {
    "fsdp": (2, ["parallel=fsdp"]),
    "ddp": (2, ["parallel=ddp"]),
    "tp": (2, ["parallel=tp"]),
    "fsdp_tp": (4, ["parallel=fsdp_tp", "parallel.tensor=2"]),
    "hsdp": (4, ["parallel=hsdp", "parallel.replicas=2"]),
}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.row("R05")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_is_named_by_every_survivor_within_five_seconds(tmp_path, layout):
    ranks, options = LAYOUTS[layout]
    told, status = job(tmp_path, "SIGKILL", 30, 60, ranks, *options)
    assert status == 1
    assert len(told) == ranks - 1, told
    for seconds, line in told:
        assert seconds < 5, told
        assert re.search(r"rank [023] on \S+ at step \d+, .* failed: rank 1 on \S+ is gone", line)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.row("R16")
@pytest.mark.parametrize(
    ("kind", "timeout", "said", "speakers"),
    [
        ("SIGSTOP", 5, "rank 1 on .* does not answer", 1),
        ("sleeps", 5, r"rank 1 on \S+ stands at step 30, .*in before_update \(.*watch_job.py", 2),
        ("all sleep", 3, r"rank [01] on \S+ at step 30, .*nothing has moved for \d+ s", 2),
        ("raises", 60, r"rank 1 on \S+ at step 30, .* failed: ValueError: a fault of this rank", 1),
    ],
)
def test_a_stuck_rank_is_named(tmp_path, kind, timeout, said, speakers):
    """Within 6 seconds of the timeout, or of twice the timeout where nobody is in a collective."""
    told, status = job(tmp_path, kind, 30, timeout, 2, "parallel=fsdp")
    assert status == 1
    assert len(told) == speakers, told
    limit = {"all sleep": 2 * timeout, "raises": 0}.get(kind, timeout) + 6
    for seconds, line in told:
        assert seconds < limit, told
        assert re.search(said, line), told
