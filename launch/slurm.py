"""One job on a Slurm cluster: `python -m geon.launch.slurm cluster=slurm experiment=...`.

The sbatch file starts torchrun once a node; the submission folder, the program and the Python
environment must be on a file system that all nodes see. `launch/sweep.py` makes one file of many
jobs, an array.
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
from geon.launch.arguments import add_config_dir
from geon.launch.compose import compose, with_folder
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

{jobs}

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

# SIGUSR1 comes {warning} s before the time limit: the ranks save, and the job is queued again.
# Slurm sends SIGTERM to the ranks as well when a job is cancelled or preempted: they save, and this
# shell waits for them.
warned=
trap 'warned=1; kill -USR1 "$ranks" || true' USR1
trap : TERM

nodes=(srun --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1)
torchrun=({python} -m torch.distributed.run
    --nnodes={nodes} --nproc-per-node={ranks_per_node}
    --rdzv-backend=c10d)
{preflight}
"${{nodes[@]}}" "${{torchrun[@]}}" --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\
    --max-restarts=3 {signals}{saving} \\
    {program} "${{words[@]}}" &
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


_PREFLIGHT = """\

# Versions, clocks and links of all ranks, before anything is trained (scripts/check_ranks.py).
"${{nodes[@]}}" "${{torchrun[@]}}" --rdzv-id="check-$SLURM_JOB_ID" \\
    --rdzv-endpoint="$head:$((port + 10000))" \\
    -m geon.scripts.check_ranks --device {device} || exit 2
"""


def render(
    config: "Config",
    jobs: Sequence[Sequence[str]],
    preflight: bool = False,
    at_once: int = 0,
    array: bool = False,
) -> str:
    """The sbatch file of a job, or of many as one array.

    GPUs are asked for unless device=cpu.

    jobs: what train.py is given, for each; `cluster` overrides are left out.
    preflight: let all ranks be compared before they train.
    at_once: most jobs of an array that run at a time; 0 for all.
    array: whether one job is an array too.

    Raises:
        UsageError: cluster=local, or a value that a directive cannot hold.
    """
    cluster = config.cluster
    check_cluster(cluster)
    lines = _directives(config, len(jobs) if array else 0, at_once)
    return _TEMPLATE.format(
        directives="\n".join(f"#SBATCH --{line}" for line in lines),
        jobs=_words(jobs, array),
        preflight=_PREFLIGHT.format(device=config.device) if preflight else "",
        setup=f"{cluster.setup.rstrip()}\n\n" if cluster.setup.strip() else "",
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_per_node,
        cpus_per_rank=cluster.cpus_per_rank,
        cpus=cluster.cpus_per_rank * cluster.ranks_per_node,
        python=shlex.quote(sys.executable),
        warning=_WARNING,
        signals=SIGNALS,
        saving=_saving(),
        program=shlex.join(PROGRAM),
    )


def _words(jobs: Sequence[Sequence[str]], array: bool) -> str:
    """Shell lines that set `words` to what train.py is given."""
    told = [shlex.join(job_overrides(job)) for job in jobs]
    if not array:
        return f"words=({told[0]})"
    cases = [f"    {i}) words=({words}) ;;" for i, words in enumerate(told)]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


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
    for key in ("partition", "account", "qos", "constraint", "mem", "gres", "time"):
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
    for line in cluster.directives:
        if (name := line.partition("=")[0]) in _OURS:
            raise UsageError(
                f"cluster.directives: '{line}' is set by {_OURS[name]}, and would be there twice"
            )


_OURS = {
    "job-name": "name",
    "ntasks-per-node": "the file itself: torchrun is started once a node",
    "cpus-per-task": "cluster.cpus_per_rank",
    "gpus-per-node": "cluster.ranks_per_node, or cluster.gres",
    "array": "the sweep",
    "requeue": "the file itself",
    "open-mode": "the file itself",
    "signal": "the file itself: the ranks save on SIGUSR1",
    **{key: f"cluster.{key}" for key in ("nodes", "partition", "account", "qos")},
    **{key: f"cluster.{key}" for key in ("constraint", "mem", "gres", "time")},
}
"""Directives that are not free, and what sets them."""


def _directives(config: "Config", jobs: int, at_once: int) -> list[str]:
    """Options of sbatch. jobs: of an array; 0 for none."""
    cluster = config.cluster
    lines = [f"job-name={config.name}"]
    if jobs:
        lines.append(f"array=0-{jobs - 1}{f'%{at_once}' if at_once else ''}")
    lines += [
        f"output=%x-{'%A_%a' if jobs else '%j'}.log",
        f"nodes={cluster.nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={cluster.cpus_per_rank * cluster.ranks_per_node}",
        f"time={cluster.time}",
        "requeue",
        "open-mode=append",
        f"signal=B:USR1@{_WARNING}",
    ]
    if config.device != "cpu" and not cluster.gres:
        lines.append(f"gpus-per-node={cluster.ranks_per_node}")
    for key in ("gres", "partition", "account", "qos", "constraint", "mem"):
        if value := getattr(cluster, key):
            lines.append(f"{key}={value}")
    return [*lines, *cluster.directives]


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
    parser.add_argument(
        "--preflight", action="store_true", help="compare all ranks before they train"
    )
    add_config_dir(parser)
    told = parser.parse_intermixed_args(arguments)

    def act() -> int:
        words = with_folder(told.overrides, told.config_dir)
        config = compose(words, "slurm")
        script = render(config, [words], told.preflight)
        ranks = config.cluster.nodes * config.cluster.ranks_per_node
        check_jobs([Start(job_overrides(words), ranks)])
        if told.dry_run:
            print(script, end="")
            return 0
        return submit(script)

    return guard(act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
