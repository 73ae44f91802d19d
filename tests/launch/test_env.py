import pytest

from geon.errors import UsageError
from geon.launch.env import Env, read_env, wants_traceback

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def environment(monkeypatch):
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
    for name in (
        *TORCHRUN,
        *slurm,
        "LOCAL_WORLD_SIZE",
        "TORCHELASTIC_RESTART_COUNT",
        "HYDRA_FULL_ERROR",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_without_a_launcher(environment):
    assert read_env() == Env(rank=0, world=1, local_rank=0, launched=False, restart=0)
    assert read_env().main


def test_what_torchrun_sets(environment):
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    environment.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_env() == Env(5, 8, local_rank=1, launched=True, restart=2, local_world=4)
    assert not read_env().main


@pytest.mark.parametrize("absent", TORCHRUN)
def test_partly_set_names_what_is_missing(environment, absent):
    for name in set(TORCHRUN) - {absent}:
        environment.setenv(name, TORCHRUN[name])
    with pytest.raises(UsageError, match=f"but not {absent}: start ranks with torchrun"):
        read_env()


@pytest.mark.parametrize("tasks", ["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_a_task_of_srun_that_knows_of_no_others_is_refused(environment, tasks):
    """Each would train alone, and all would write into one run folder."""
    environment.setenv("SLURM_PROCID", "1")
    environment.setenv(tasks, "2")
    with pytest.raises(UsageError, match="Slurm started 2 tasks .* torchrun once a node"):
        read_env()
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert read_env().world == 8


def test_one_task_of_srun_in_a_larger_job_trains(environment):
    environment.setenv("SLURM_PROCID", "0")
    environment.setenv("SLURM_NTASKS", "4")
    environment.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert read_env() == Env()


def test_traceback_is_asked_for_as_in_hydra(environment):
    assert not wants_traceback()
    environment.setenv("HYDRA_FULL_ERROR", "1")
    assert wants_traceback()
