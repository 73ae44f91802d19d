"""One writer a run folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from geon.engine import lock, main
from geon.engine.lock import Lock
from geon.errors import UsageError
from geon.launch.env import Env, read_env, started_at
from tests.reliability.identity_job import train, train_until

HOLD = """
import sys, time
from pathlib import Path
from geon.engine.lock import Lock
Lock("job").take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_live_process_is_named_and_a_dead_one_is_taken_over_from(tmp_path, holder):
    mine = Lock()
    with pytest.raises(
        UsageError, match=f"in use by process {holder.pid} on {socket.gethostname()}"
    ):
        mine.take(tmp_path)
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    told = mine.take(tmp_path)
    assert f"from process {holder.pid} on " in told and "which is gone" in told
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    mine.release()
    assert not list(tmp_path.iterdir())
    assert mine.take(tmp_path) is None
    mine.release()


def test_without_flock_the_start_of_the_process_tells(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.raises(UsageError, match=f"in use by process {holder.pid}"):
        Lock().take(tmp_path)
    file = tmp_path / "lock.json"
    held = json.loads(file.read_text())
    assert held["started"] == started_at(holder.pid) != started_at(os.getpid())
    # The number belongs to another process by now.
    file.write_text(json.dumps({**held, "pid": os.getpid()}))
    mine = Lock()
    assert "which is gone" in mine.take(tmp_path)
    mine.release()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "SILENCE", 0.5)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)


def elsewhere(folder, **more):
    held = {"host": "node17", "pid": 4242, "started": "x", "job": "theirs", **more}
    (folder / "lock.json").write_text(json.dumps(held))
    return folder / "lock.json"


def test_a_holder_on_another_host_lives_as_long_as_it_touches_the_file(tmp_path, quick):
    file, stop = elsewhere(tmp_path), threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match="in use by process 4242 on node17"):
            Lock().take(tmp_path)
    finally:
        stop.set()
        thread.join()
    mine = Lock()
    assert "took over" in mine.take(tmp_path)
    mine.release()


def test_an_earlier_attempt_of_the_same_job_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_moves", None)
    elsewhere(tmp_path, job="mine")
    mine = Lock("mine")
    assert "from process 4242 on node17" in mine.take(tmp_path)
    mine.release()


def test_the_holder_touches_the_file(tmp_path, quick):
    mine = Lock()
    mine.take(tmp_path)
    first = (tmp_path / "lock.json").stat().st_mtime_ns
    end = time.monotonic() + 5
    while (tmp_path / "lock.json").stat().st_mtime_ns == first:
        assert time.monotonic() < end
        time.sleep(0.05)
    mine.release()


def test_a_second_writer_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train_until(monkeypatch, 3, tmp_path)
    other = Lock()
    other.take(folder)
    before = sorted(p.name for p in folder.rglob("*"))
    for resume in ("auto", "never"):
        with pytest.raises(UsageError, match="is in use by process"):
            train(tmp_path, f"checkpoint.resume={resume}")
    assert sorted(p.name for p in folder.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    other.release()
    train(tmp_path)


def test_of_two_that_start_at_once_the_second_is_refused(tmp_path, monkeypatch):
    """Both have chosen fresh weights, in no folder; the first one trains when the second opens."""
    assemble, first = main.assemble, []

    def assemble_late(*given):
        if not first:
            first.append(True)
            train_until(monkeypatch, 3, tmp_path)
        return assemble(*given)

    monkeypatch.setattr(main, "assemble", assemble_late)
    with pytest.raises(UsageError, match="was made by another process meanwhile"):
        train(tmp_path, "optim=adamw")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 1


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
UUID = "0b3c9d1e-8a51-4b6f-9f0e-3a2f1c5d7e90"


@pytest.mark.parametrize(
    ("told", "job", "restart"),
    [
        ({}, "", 0),
        ({"SLURM_JOB_ID": "7"}, "slurm 7", 0),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "slurm 7", 2),
        ({"TORCHELASTIC_RUN_ID": UUID, "TORCHELASTIC_RESTART_COUNT": "1"}, UUID, 1),
        ({"TORCHELASTIC_RUN_ID": "7", "SLURM_JOB_ID": "7"}, "slurm 7", 0),
        ({"TORCHELASTIC_RUN_ID": "none"}, None, 0),
        ({"TORCHELASTIC_RUN_ID": "again"}, None, 0),
    ],
)
def test_what_attempts_of_a_job_share(monkeypatch, told, job, restart):
    for name in (*NAMES, "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    if "TORCHELASTIC_RUN_ID" in told:
        told = {**dict.fromkeys(NAMES, "1"), **told}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    env = read_env()
    if job is None:  # a name that other jobs may have: with the launcher's process, which outlives
        parent = os.getppid()
        job = f"{told['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {parent} {started_at(parent)}"
    assert (env.job, env.restart) == (job, restart)


def test_jobs_without_an_identity_are_no_restarts(tmp_path, monkeypatch):
    """Two commands by hand, one after the other, in one Slurm allocation: no restart of the job."""
    by_hand = Env(job="slurm 7")
    train_until(monkeypatch, 3, tmp_path, env=by_hand)
    train_until(monkeypatch, 3, tmp_path, "checkpoint.resume=never", env=by_hand)
    assert (tmp_path / "run~1").is_dir()
