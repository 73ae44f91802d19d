"""A grid of jobs: `python -m geon.launch.sweep sweep=lr`, here or as an array of Slurm's.

On this machine each is a launch of its own; with cluster=slurm one sbatch file holds all. A sweep
may have arms: sides of a comparison with settings and values of their own. Jobs that have finished
are skipped, so the same command resumes a sweep. A sweep of one's own is a file in configs/sweep,
or in the folder of --config-dir.
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
from typing import TYPE_CHECKING, Any, NoReturn

from geon.errors import Preempted, UsageError
from geon.launch import slurm
from geon.launch.arguments import add_config_dir
from geon.launch.compose import compose, with_folder
from geon.launch.leave import guard
from geon.launch.local import command
from geon.launch.preflight import Start, check_jobs

if TYPE_CHECKING:
    from geon.configs.schema import Config

_LOG_LINES = 12
_POLL_SECONDS = 0.2
FOLLOWS = ("data.vocab_size", "model.vocab_size")
"""Keys whose 0 means what the data say."""
_OF_SWEEP = re.compile(r"[+~]*sweep[.=]")
_OF_CLUSTER = re.compile(r"[+~]*cluster[.=]")


@dataclass(frozen=True)
class Job:
    """One point of the grid.

    Attributes:
        arm: side of the comparison that it belongs to; empty where there is one only.
        point: its values in the grid.
        arguments: what train.py is given.
        folder: its run folder.
    """

    arm: str
    point: dict[str, Any]
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
        UsageError: no grid, a bad key or value in it, or a job that ran with other settings.
    """
    sweep, jobs = config.sweep, []
    if not sweep.grid and not sweep.arms:
        raise UsageError(
            f"sweep={config.sweep.name} has no grid: choose one with sweep=lr, or add a file to "
            "configs/sweep and name it"
        )
    for arm, settings in sweep.arms.items() or [("", None)]:
        grid = {**sweep.grid, **(settings.grid if settings else {})}
        if empty := [key for key, values in grid.items() if not values]:
            raise UsageError(f"sweep.grid gives '{empty[0]}' no values: give it at least one")
        points = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
        jobs += [make_job(config, overrides, arm, point) for point in points]
    names = [job.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"sweep.grid has two jobs named '{twice[0]}': drop or rename one value")
    return jobs


def make_job(sweep: "Config", overrides: Sequence[str], arm: str, point: Mapping[str, Any]) -> Job:
    """Check one point of an arm's grid.

    JSON is also Hydra's grammar for all values but nested dicts.

    Raises:
        UsageError: a bad key or value, or a job of this name that ran with other settings.
    """
    settings = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]
    name = job_name(f"{sweep.name}-{arm}" if arm else sweep.name, point)
    own = sweep.sweep.arms[arm].overrides if arm else []
    # A job need not know of its siblings, and composes faster without them.
    shared = [text for text in overrides if not _OF_SWEEP.match(text)]
    arguments = [*sweep.sweep.overrides, *shared, *own, *settings, f'name="{name}"']
    try:
        config = compose(arguments)
    except UsageError as error:
        place = f"arm {arm} at " if arm else ""
        raise UsageError(f"sweep.grid at {place}{', '.join(settings)}: {error}") from None
    arguments = [text for text in arguments if not _OF_CLUSTER.match(text)]
    job = Job(
        arm, dict(point), name, arguments, config.cluster.ranks_per_node, Path(config.output) / name
    )
    if job.ranks < 1:
        raise UsageError(f"cluster.ranks_per_node must be positive, got {job.ranks}")
    _check_same_run(job, config)
    return job


def _check_same_run(job: Job, config: "Config") -> None:
    """Refuse to take another run's result for a job's, or to go on with another run's half.

    A half-finished one may go on as checkpoint.allow_change says, or is left by resume=never.
    """
    from dataclasses import asdict

    from omegaconf import OmegaConf

    from geon.configs.changes import MEASURED, Kind, changes, covers, flat, plain

    file, done, told = job.folder / "config.yaml", job.report is not None, config.checkpoint
    if not file.is_file() or (not done and told.resume != "auto"):
        return
    there: Any = OmegaConf.to_container(OmegaConf.load(file))
    for change in changes(flat(there), flat(plain(asdict(config)))):
        if change.key in FOLLOWS and not change.new:  # the run has written what it followed
            continue
        free = change.kind is Kind.free and change.key not in MEASURED
        allowed = not done and any(covers(entry, change.key) for entry in told.allow_change)
        if not free and not allowed:
            state = "a finished" if done else "half of a"
            raise UsageError(
                f"'{job.folder}' holds {state} run with {change.key}={change.old}, this sweep has "
                f"{change.new}: choose another name or output, or remove that folder"
            )


def _gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (told := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in told.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(listed.stdout.count("GPU-"))]


def _cores() -> int:
    known = getattr(os, "sched_getaffinity", None)
    return len(known(0)) if known else os.cpu_count() or 1


def share(ranks: int, place: int, places: int, gpus: Sequence[str]) -> dict[str, str]:
    """Environment of the job at one of `places`: CPU threads and GPUs of its own.

    Jobs share GPUs only where these do not suffice.
    """
    own = {"OMP_NUM_THREADS": str(max(1, _cores() // places // ranks))}
    if places > 1 and ranks <= len(gpus):
        picked = (gpus[(place * ranks + i) % len(gpus)] for i in range(ranks))
        own["CUDA_VISIBLE_DEVICES"] = ",".join(picked)
    return own


def run_jobs(jobs: Sequence[Job], places: int) -> list[Job]:
    """Run jobs to their ends, `places` at a time; those under way end with this process.

    places: 0 for as many as the GPUs, or without GPUs the cores, have room for.

    Returns:
        The jobs that failed; each has been reported on stderr.
    """
    waiting, failed, gpus = list(jobs), [], _gpus()
    if not places:
        most = max((job.ranks for job in jobs), default=1)
        places = max(1, (len(gpus) or _cores()) // most)
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
    config = compose(overrides, "sweep")
    jobs = expand(config, overrides)
    left = [job for job in jobs if job.report is None]
    if config.cluster.name != "local":
        return _submit(compose([*config.sweep.overrides, *overrides]), left, dry_run)
    if config.cluster.nodes != 1:
        raise UsageError(
            f"cluster.nodes must be 1 for a sweep on this machine, got {config.cluster.nodes}; "
            "cluster=slurm makes an array of its jobs"
        )
    check_jobs([Start(job.arguments, job.ranks, job.ranks > 1) for job in left])
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


def _stop(*_: object) -> NoReturn:
    """End on SIGTERM as a run does: jobs under way are asked to save, and the status is 75."""
    raise Preempted("sweep: asked to stop; jobs under way have saved, the same command goes on")


def _submit(config: "Config", jobs: Sequence[Job], dry_run: bool) -> int:
    """Give jobs to Slurm as one array, or print its file; returns the exit status."""
    if not jobs:
        print("all jobs have finished: nothing to submit")
        return 0
    ranks = {job.ranks for job in jobs}
    if len(ranks) > 1:
        raise UsageError(
            "cluster.ranks_per_node has several values: the jobs of an array are alike"
        )
    script = slurm.render(
        config, [job.arguments for job in jobs], at_once=config.sweep.parallel_jobs, array=True
    )
    total = config.cluster.nodes * config.cluster.ranks_per_node
    check_jobs([Start(job.arguments, total) for job in jobs])
    if dry_run:
        print(script, end="")
        return 0
    return slurm.submit(script)


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.launch.sweep", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. sweep=lr seed=1")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs, run none")
    add_config_dir(parser)
    told = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    return guard(lambda: sweep(with_folder(told.overrides, told.config_dir), told.dry_run))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
