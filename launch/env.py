"""What the launcher told this process: the only place that reads the environment."""

import os
from dataclasses import dataclass

from geon.errors import UsageError


@dataclass(frozen=True)
class Env:
    """This process among the others.

    Attributes:
        rank, world: position among all processes, and their number.
        local_rank: position on this machine; picks the GPU.
        launched: whether torchrun (or an equal) set the rendezvous variables.
        restart: how often torchrun has restarted the job.
        local_world: ranks on this machine; 1 where the launcher does not say.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    launched: bool = False
    restart: int = 0
    local_world: int = 1

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
        return Env()
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
        restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def _refuse_lone_tasks() -> None:
    """Refuse to be one of srun's tasks: each would train alone, in one run folder."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks.isdigit() and int(tasks) > 1:
        raise UsageError(
            f"Slurm started {tasks} tasks (SLURM_NTASKS) and none knows of the others: start "
            "torchrun once a node, as the file of `python -m geon.launch.slurm` does, or one "
            "process with srun --ntasks=1"
        )


def default(name: str, value: str) -> None:
    """Set a variable that other packages read, unless the user has."""
    os.environ.setdefault(name, value)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks, as Hydra users do."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") == "1"


def under_launcher() -> bool:
    """Whether this process is one of several ranks that a launcher started."""
    return "RANK" in os.environ
