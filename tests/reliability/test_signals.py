"""Signals: what they do before, in and after training, and what ties a rank to its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geon.launch import signals
from geon.launch.local import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def start(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, time\nfrom geon.launch import signals\n{code}"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


READY = "print('ready', flush=True)\n"
LOOP = """
for _ in range(500):
    time.sleep(0.01)
    if signals.caught():
        print(signals.caught(), flush=True)
        time.sleep(3)
"""


def ready(process):
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.row("R14")
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_before_training_a_signal_ends_the_process_at_once(number, status):
    process = ready(start(f"signals.listen()\n{READY}time.sleep(9)"))
    process.send_signal(number)
    assert process.wait(5) == status
    assert "nothing to save" in process.stderr.read()


@pytest.mark.row("R14")
def test_in_training_only_a_second_ctrl_c_does_and_a_repeated_one_is_no_second():
    process = ready(start(f"signals.listen()\nsignals.training(True)\n{READY}{LOOP}"))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    process.send_signal(signal.SIGINT)  # as a launcher passes on what the terminal has sent
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


@pytest.mark.row("R34")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_rank_ends_with_its_launcher():
    child = "signals.die_with_parent(); print(os.getpid(), flush=True); time.sleep(20)"
    code = (
        "import subprocess\n"
        f"code = 'import os, time; from geon.launch import signals; {child}'\n"
        "subprocess.Popen([sys.executable, '-c', code]); time.sleep(20)"
    )
    launcher = start(code, RANK="0")
    rank = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 5
    while alive(rank) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(rank)


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_bad_input_is_remembered_by_the_next_attempt_of_the_same_job_alone(tmp_path, monkeypatch):
    error = tmp_path / "job" / "attempt_0" / "0" / "error.json"
    error.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    signals.remember_bad_input()
    assert not signals.refused_before()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = tmp_path / "job" / "attempt_1" / "1" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(again))
    assert signals.refused_before()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "other" / "a" / "0" / "e.json"))
    assert not signals.refused_before()
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    signals.remember_bad_input()
    assert not signals.refused_before()


@pytest.mark.slow
@pytest.mark.dist
def test_bad_input_is_not_started_again(tmp_path):
    """exit 2 under --max-restarts 3: the import of torch is paid for once, not four times."""
    from geon.launch.local import torchrun_command

    command = torchrun_command(2, ["parallel=single", f"output={tmp_path}"])
    command.insert(4, "--max-restarts=3")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    # The first rank to say so may take the other along.
    assert done.stderr.count("geon: error: parallel=single runs one process") in (1, 2)
    assert not list(tmp_path.iterdir())
