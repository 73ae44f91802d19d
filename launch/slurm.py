"""One job on a Slurm cluster: `python -m geon.launch.slurm cluster=slurm experiment=...`.

The sbatch file starts torchrun once a node; the submission folder, the program and the Python
environment must be on a file system that all nodes see.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.launch.local import PROGRAM, SIGNALS
from geon.launch.preflight import Start, check_jobs

if TYPE_CHECKING:
    from geon.configs.schema import ClusterConfig, Config

_WARNING = 120
"""Seconds before its end in which Slurm tells a job to save."""

_SAVING = 100
"""Seconds that torchrun then gives its ranks, where it can be told (30 where not)."""

_TEMPLATE = """\
#!/bin/bash
{directives}

set -e

{setup}export OMP_NUM_THREADS={cpus_per_rank}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# SIGUSR1 comes {warning} s before the time limit: the ranks save, and the job is queued again.
# Slurm sends SIGTERM to the ranks as well when a job is cancelled or preempted: they save, and this
# shell waits for them.
warned=
trap 'warned=1; kill -USR1 "$ranks" || true' USR1
trap : TERM

srun --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1 \\
    {python} -m torch.distributed.run \\
    --nnodes={nodes} --nproc-per-node={ranks_per_node} --max-restarts=3 \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\
    {signals}{saving} \\
    {program} &
ranks=$!

# A trapped signal ends `wait`, not what it waits for; the last one tells its exit status.
while kill -0 "$ranks" 2> /dev/null; do
    wait "$ranks" || true
done
wait "$ranks" && status=0 || status=$?
if [ -n "$warned" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def render(config: "Config", overrides: Sequence[str]) -> str:
    """The sbatch file of a job.

    GPUs are asked for unless device=cpu. `cluster` overrides are left out of what train.py is
    given.

    Raises:
        UsageError: cluster=local, or a value that a directive cannot hold.
    """
    cluster = config.cluster
    check_cluster(cluster)
    rest = job_overrides(overrides)
    return _TEMPLATE.format(
        directives="\n".join(f"#SBATCH --{line}" for line in _directives(config)),
        setup=f"{cluster.setup.rstrip()}\n\n" if cluster.setup.strip() else "",
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_per_node,
        cpus_per_rank=cluster.cpus_per_rank,
        cpus=cluster.cpus_per_rank * cluster.ranks_per_node,
        python=shlex.quote(sys.executable),
        warning=_WARNING,
        signals=SIGNALS,
        saving=_saving(),
        program=shlex.join([*PROGRAM, *rest]),
    )


def _saving() -> str:
    """The option of torchrun that gives ranks more time to save, where this one's has it."""
    try:
        major, minor = metadata.version("torch").split(".")[:2]
        known = (int(major), int(minor)) >= (2, 13)
    except (metadata.PackageNotFoundError, ValueError):
        known = False
    return f" --shutdown-timeout={_SAVING}" if known else ""


def job_overrides(overrides: Sequence[str]) -> list[str]:
    """What train.py is given: all but the cluster's."""
    return [text for text in overrides if not re.match(r"[+~]*cluster[.=@]", text)]


def check_cluster(cluster: "ClusterConfig") -> None:
    """Check the values that become directives.

    Raises:
        UsageError: names the key.
    """
    if cluster.name == "local":
        raise UsageError(
            "cluster=local is this machine and needs no sbatch file: set cluster=slurm, or start "
            "train.py with torchrun"
        )
    for key in ("nodes", "ranks_per_node", "cpus_per_rank"):
        if getattr(cluster, key) < 1:
            raise UsageError(f"cluster.{key} must be positive, got {getattr(cluster, key)}")
    for key in ("partition", "account", "time"):
        if re.search(r"\s", getattr(cluster, key)):
            raise UsageError(
                f"cluster.{key} '{getattr(cluster, key)}' has a space or line break, which a "
                "directive cannot hold"
            )
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", cluster.time):
        raise UsageError(
            f"cluster.time '{cluster.time}' is not a Slurm time limit: write minutes, "
            "hours:minutes:seconds or days-hours"
        )


def _directives(config: "Config") -> list[str]:
    cluster = config.cluster
    lines = [
        f"job-name={config.name}",
        "output=%x-%j.log",
        f"nodes={cluster.nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={cluster.cpus_per_rank * cluster.ranks_per_node}",
        f"time={cluster.time}",
        "requeue",
        "open-mode=append",
        f"signal=B:USR1@{_WARNING}",
    ]
    if config.device != "cpu":
        lines.append(f"gpus-per-node={cluster.ranks_per_node}")
    if cluster.partition:
        lines.append(f"partition={cluster.partition}")
    if cluster.account:
        lines.append(f"account={cluster.account}")
    return lines


def submit(script: str) -> int:
    """Give a file to sbatch on its standard input; returns sbatch's exit status.

    Raises:
        UsageError: this machine has no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not installed on this machine: submit from a login node of the cluster, or "
            "print the file with --dry-run"
        )
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m geon.launch.slurm", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. cluster=slurm")
    parser.add_argument("--dry-run", action="store_true", help="print the file, submit nothing")
    told = parser.parse_intermixed_args(arguments)

    def act() -> int:
        config = compose(told.overrides, "slurm")
        script = render(config, told.overrides)
        ranks = config.cluster.nodes * config.cluster.ranks_per_node
        check_jobs([Start(job_overrides(told.overrides), ranks)])
        if told.dry_run:
            print(script, end="")
            return 0
        return submit(script)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
