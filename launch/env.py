"""What the launcher told this process: the only place that reads the environment."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from geon.errors import UsageError


@dataclass(frozen=True)
class Env:
    """This process among the others.

    Attributes:
        rank, world: position among all processes, and their number.
        local_rank: position on this machine; picks the GPU.
        launched: whether torchrun (or an equal) set the rendezvous variables.
        restart: how often torchrun or Slurm has restarted the job, as far as this process is told.
        job: what all attempts of one job share, and no other job; empty where nothing restarts it.
        local_world: ranks on this machine; 1 where the launcher does not say.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False
    restart: int = 0
    local_world: int = 1
    job: str = field(default="", compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


def read_env() -> Env:
    """Read the variables that torchrun sets.

    Raises:
        UsageError: only some of them are set, or srun started several tasks without them.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = [name for name in names if name in os.environ]
    if not found:
        _refuse_lone_tasks()
        return Env(restart=_restarts("SLURM_RESTART_COUNT"), job=_slurm_job())
    if len(found) < len(names):
        missing = ", ".join(sorted(set(names) - set(found)))
        raise UsageError(
            f"environment sets {', '.join(found)} but not {missing}: start ranks with torchrun"
        )
    return Env(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        launched=True,
        restart=_restarts("TORCHELASTIC_RESTART_COUNT") + _restarts("SLURM_RESTART_COUNT"),
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        job=_launched_job(),
    )


def hub_endpoint() -> str:
    """Base address of the Hugging Face hub, or of a mirror, where the user has set one."""
    return os.environ.get("HF_ENDPOINT", "")


def netrc_file() -> Path:
    """Where `wandb login`, and others, keep keys by host."""
    found = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else []
    found += [Path.home() / ".netrc", Path.home() / "_netrc"]
    return next((path for path in found if path.is_file()), found[0])


def agent_run() -> str:
    """Id of the run that `wandb agent` has started this process for; empty without one."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def _refuse_lone_tasks() -> None:
    """Refuse to be one of srun's tasks: each would train alone, in one run folder."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks.isdigit() and int(tasks) > 1:
        raise UsageError(
            f"Slurm started {tasks} tasks (SLURM_NTASKS) and none knows of the others: start "
            "torchrun once a node, as the file of `python -m geon.launch.slurm` does, or one "
            "process with srun --ntasks=1"
        )


def _restarts(name: str) -> int:
    count = os.environ.get(name, "0")
    return int(count) if count.isdecimal() else 0


def _slurm_job() -> str:
    number = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm {number}" if number else ""


def _launched_job() -> str:
    """Identity of a job whose ranks a launcher started: counts of restarts differ between nodes.

    `--rdzv-id` may be the same for many jobs, unless it is that of Slurm, or torchrun's own of
    `--standalone`; otherwise the launcher's process on this host is added, which outlives ranks.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if len(name) == 36 and name.count("-") == 4:
        return name
    if name == os.environ.get("SLURM_JOB_ID"):
        return f"slurm {name}"
    parent = os.getppid()
    return f"{name} {socket.gethostname()} {parent} {started_at(parent)}"


def started_at(process: int) -> str:
    """When a process of this host started, in ticks since a boot; empty if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return _alive(process)
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"


def _alive(process: int) -> str:
    """Where /proc is not: whether there is such a process, without its start."""
    if Path("/proc/self/stat").exists() or process <= 0:
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"


def default(name: str, value: str) -> None:
    """Set a variable that other packages read, unless the user has."""
    os.environ.setdefault(name, value)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks, as Hydra users do."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") == "1"


def under_launcher() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    return "RANK" in os.environ
