"""A grid of jobs on this machine, one process each: `python -m geon.launch.sweep sweep=lr`.

Jobs that have finished are skipped, so the same command resumes a sweep. A sweep of one's own is
a file in configs/sweep.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.launch.local import command

if TYPE_CHECKING:
    from geon.configs.schema import Config

_LOG_LINES = 12
_POLL_SECONDS = 0.2
_RESULT_DEPENDS_ON = ("seed", "model", "optim", "data", "schedule")


@dataclass(frozen=True)
class Job:
    """One point of the grid.

    Attributes:
        arguments: what train.py is given.
        folder: its run folder.
    """

    name: str
    arguments: list[str]
    ranks: int
    folder: Path

    @property
    def log(self) -> Path:
        """File of everything that the job prints."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def report(self) -> dict[str, Any] | None:
        """Result; None until the job has finished."""
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.is_file() else None


def job_name(base: str, point: Mapping[str, Any]) -> str:
    """Name of a job: `<base>-<key>=<value>,...`, with the last part of a key where it is unique."""
    parts = {key: re.split(r"[./]", key)[-1] for key in point}
    shorts = list(parts.values())
    told = ",".join(
        f"{parts[key] if shorts.count(parts[key]) == 1 else key}="
        f"{value if isinstance(value, str) else json.dumps(value)}"
        for key, value in point.items()
    )
    return f"{base}-{re.sub(r'[^A-Za-z0-9._=,+-]', '-', told)}"


def expand(config: "Config", overrides: Sequence[str]) -> list[Job]:
    """Jobs of `sweep.grid`, in the order of its product; every one is composed and checked.

    Raises:
        UsageError: no grid, a bad key or value in it, or a finished job with other settings.
    """
    grid = config.sweep.grid
    if not grid:
        raise UsageError(
            f"sweep={config.sweep.name} has no grid: choose one with sweep=lr, or add a file to "
            "configs/sweep and name it"
        )
    if empty := [key for key, values in grid.items() if not values]:
        raise UsageError(f"sweep.grid gives '{empty[0]}' no values: give it at least one")
    points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    jobs = [_make_job(config.name, point, overrides) for point in points]
    names = [job.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"sweep.grid has two jobs named '{twice[0]}': drop or rename one value")
    return jobs


def _make_job(base: str, point: Mapping[str, Any], overrides: Sequence[str]) -> Job:
    """Check one point of the grid. JSON is also Hydra's grammar for all values but nested dicts."""
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]
    name = job_name(base, point)
    arguments = [*overrides, *settings, f'name="{name}"']
    try:
        config = compose(arguments)
    except UsageError as error:
        raise UsageError(f"sweep.grid at {', '.join(settings)}: {error}") from None
    job = Job(name, arguments, config.cluster.ranks_per_node, Path(config.output) / name)
    if job.ranks < 1:
        raise UsageError(f"cluster.ranks_per_node must be positive, got {job.ranks}")
    if job.report is not None:
        _check_same_run(job.folder, config)
    return job


def _check_same_run(folder: Path, config: "Config") -> None:
    """Refuse to take another run's result for a job's."""
    from omegaconf import OmegaConf

    there = _flat(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    here = _flat(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    for key, value in here.items():
        if key.split(".")[0] in _RESULT_DEPENDS_ON and there.get(key, value) != value:
            raise UsageError(
                f"'{folder}' holds a finished run with {key}={there[key]}, this sweep has "
                f"{value}: choose another name or output, or remove that folder"
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key."""
    if not isinstance(node, dict):
        return {prefix: node}
    inner = (_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for found in inner for key, value in found.items()}


def _gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in told.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(listed.stdout.count("GPU-"))]


def share(ranks: int, place: int, places: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of the job at one of `places`: CPU threads and GPUs of its own.

    Jobs share GPUs only where these do not suffice.
    """
    known = getattr(os, "sched_getaffinity", None)
    cores = len(known(0)) if known else os.cpu_count() or 1
    own = {"OMP_NUM_THREADS": str(max(1, cores // places // ranks))}
    if places > 1 and ranks <= len(gpus):
        picked = (gpus[(place * ranks + i) % len(gpus)] for i in range(ranks))
        own["CUDA_VISIBLE_DEVICES"] = ",".join(picked)
    return own


def run_jobs(jobs: Sequence[Job], places: int) -> list[Job]:
    """Run jobs to their ends, `places` at a time; those under way end with this process.

    Returns:
        The jobs that failed; each has been reported on stderr.
    """
    waiting, failed, gpus = list(jobs), [], _gpus()
    running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for place in sorted(set(range(places)) - set(running))[: len(waiting)]:
                job = waiting.pop(0)
                running[place] = job, _start(job, share(job.ranks, place, places, gpus))
            time.sleep(_POLL_SECONDS)
            for place, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    if not _succeeded(job, process.returncode):
                        failed.append(job)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failed


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    print(f"started   {job.name}", flush=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            command(job.ranks, job.arguments),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _succeeded(job: Job, status: int) -> bool:
    if status == 0:
        print(f"finished  {job.name}", flush=True)
        return True
    print(f"failed    {job.name}", flush=True)
    tail = job.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    told = f"geon: error: job {job.name} failed with exit status {status}; {job.log} ends:"
    print(told, *(f"    {line}" for line in tail), sep="\n", file=sys.stderr, flush=True)
    return False


def table(jobs: Sequence[Job]) -> str:
    """The closing table; dashes for a job without a result."""
    width = max(len(job.name) for job in jobs)
    rows = [f"{'job':<{width}}  {'val loss':>17}  {'seconds':>8}"]
    for job in jobs:
        loss = seconds = "-"
        if report := job.report:
            unit = "token" if report["val_nats_per_byte"] is None else "byte"
            loss = f"{report[f'val_nats_per_{unit}']:.4f} nats/{unit}"
            seconds = f"{report['train_seconds']:.1f}"
        rows.append(f"{job.name:<{width}}  {loss:>17}  {seconds:>8}")
    return "\n".join(rows)


def sweep(overrides: Sequence[str], dry_run: bool = False) -> int:
    """Run the jobs of a sweep that have not finished, or list all of them.

    Returns:
        Exit status: 1 when a job failed.

    Raises:
        UsageError: before any job is started.
    """
    config = compose(overrides)
    if config.sweep.parallel_jobs < 1:
        raise UsageError(f"sweep.parallel_jobs must be positive, got {config.sweep.parallel_jobs}")
    if config.cluster.nodes != 1:
        raise UsageError(f"cluster.nodes must be 1 for a sweep, got {config.cluster.nodes}")
    jobs = expand(config, overrides)
    left = [job for job in jobs if job.report is None]
    for job in jobs:
        if dry_run:
            print("to run   " if job in left else "finished ", job.name)
            print(f"    {shlex.join(command(job.ranks, job.arguments))}")
        elif job not in left:
            print(f"skipped   {job.name}: finished before", flush=True)
    if dry_run:
        return 0
    failed = run_jobs(left, config.sweep.parallel_jobs)
    print(f"\n{table(jobs)}")
    return 1 if failed else 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.launch.sweep", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. sweep=lr seed=1")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs, run none")
    told = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return guard(lambda: sweep(told.overrides, told.dry_run))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
