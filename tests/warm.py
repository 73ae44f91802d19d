"""Programs under Python started by a fork of a process that has torch and geon loaded already.

A fresh process spends seconds on imports; a job of four ranks and their launcher ten and more.
`run` starts ranks as `torchrun --standalone` does, without them: the same variables, a store that
outlives the ranks, SIGTERM for the others when one fails, 1 as the status then. What is about
torchrun itself (restarts, signals, its own words) starts torchrun.

A server, one for each process of tests, forks an agent for each job, which forks the ranks and only
then starts its store: threads, CUDA and process groups are never there before a fork.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = "torch._dynamo torch.distributed.fsdp torch.distributed.tensor.parallel matplotlib.pyplot"
LOADED += " torch.distributed.checkpoint geon.engine.main geon.engine.checks geon.launch.compose"
HEAVY = {"deepspeed": "deepspeed"}
LAUNCHER = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HYDRA_FULL_ERROR"]
GRACE = 10.0
"""Seconds from SIGTERM to SIGKILL for ranks that are left when one has failed."""


class Server:
    """A process that forks jobs; started at the first one, ended with this process."""

    def __init__(self, modules: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules.split()],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lock = threading.Lock()
        atexit.register(self.process.stdin.close)

    def ask(self, job: dict) -> dict:
        with self.lock:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of warm ranks ended with {self.process.wait()}")
        return json.loads(answer)


_servers: dict[str, Server] = {}


def run(
    ranks: int,
    program: Path | str,
    arguments: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program on so many ranks (0: one process without a launcher) and capture its output.

    Raises:
        subprocess.TimeoutExpired: with what was printed until then; all ranks are gone.
    """
    words = " ".join([str(program), *map(str, arguments)])
    needs = LOADED + "".join(f" {HEAVY[name]}" for name in HEAVY if name in words)
    if needs not in _servers:
        _servers[needs] = Server(needs)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        job = {
            "ranks": ranks,
            "command": [str(program), *map(str, arguments)],
            "env": {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})},
            "cwd": str(cwd or Path.cwd()),
            "timeout": timeout,
            "out": str(out),
            "err": str(err),
        }
        status = _servers[needs].ask(job)["status"]
        said = [file.read_text("utf-8", errors="replace") for file in (out, err)]
    if status is not None and status > 128 and not ranks:
        status = 128 - status  # by a signal, as subprocess says it
    if status is None:
        raise subprocess.TimeoutExpired(job["command"], timeout, *said)
    return subprocess.CompletedProcess(job["command"], status, *said)


def serve(modules: Sequence[str]) -> None:
    """Fork a job for each line of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages print when they are loaded
    for module in modules:
        __import__(module)
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        agent = os.fork()
        if agent == 0:
            watch(job)
            return
        _, word = os.waitpid(agent, 0)
        code = os.waitstatus_to_exitcode(word)
        print(json.dumps({"status": None if code == 124 else code}), file=answers, flush=True)
    os._exit(0)


def watch(job: dict) -> None:
    """Fork the ranks of a job, wait for them, end with their status."""
    os.setsid()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, name, left = listening.getsockname()[1], str(uuid.uuid4()), {}
        for rank in range(max(1, job["ranks"])):
            child = os.fork()
            if child == 0:
                listening.close()
                begin(job, rank, port, name)
                return
            left[child] = rank
        if job["ranks"]:
            from torch.distributed import TCPStore

            at = {"is_master": True, "wait_for_workers": False}
            held = os.dup(listening.fileno())
            store = TCPStore("127.0.0.1", port, **at, master_listen_fd=held)  # noqa: F841
        code = wait(
            left, time.monotonic() + job["timeout"], alone=not job["ranks"], said=job["err"]
        )
        os._exit(code)
        del store


def wait(left: dict[int, int], until: float, alone: bool, said: str) -> int:
    """Status of the ranks: torchrun's 1 when one of them fails; 124 when the time is over."""
    failed, over, killing = 0, False, None
    while left:
        child, word = os.waitpid(-1, os.WNOHANG)
        if child in left:
            rank, code = left.pop(child), os.waitstatus_to_exitcode(word)
            if code and not failed:
                failed = (code if code > 0 else 128 - code) if alone else 1
                if not alone:
                    with Path(said).open("a") as file:
                        file.write(f"rank {rank} of the test's job ended with {code}\n")
            continue
        now = time.monotonic()
        over = over or now > until
        if (failed or over) and killing is None:
            killing = now + GRACE
            for child in left:
                os.kill(child, signal.SIGTERM)
        elif killing is not None and now > killing:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return 124 if over else failed


def begin(job: dict, rank: int, port: int, name: str) -> None:
    """Become one rank: its streams, environment, folder and arguments; then run the program."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for place, file in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), place)
    os.environ.clear()
    os.environ.update(job["env"])
    if job["ranks"]:
        world = str(job["ranks"])
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=world,
            LOCAL_WORLD_SIZE=world,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID=name,
            TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_MAX_RESTARTS="0",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    os.chdir(job["cwd"])
    import numpy
    import torch

    numpy.random.seed()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    program, *sys.argv[1:] = job["command"]
    sys.argv[0], sys.path[0] = program, str(Path(program).parent)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    serve(sys.argv[1:])
