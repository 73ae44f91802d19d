import os
import shutil
import signal
import subprocess
import time

import pytest

from geon.errors import UsageError
from geon.launch import slurm, sweep
from geon.launch.compose import compose
from tests.launch.jobs import SMALLEST

bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def script_of(*told, **how):
    return slurm.render(compose(told), [told], **how)


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_directives_and_launch_follow_the_cluster_group():
    script = script_of(
        "cluster=slurm",
        "cluster.nodes=2",
        "cluster.ranks_per_node=4",
        "cluster.cpus_per_rank=3",
        "cluster.partition=gpu",
        "cluster.account=phys",
        "cluster.time=1-00:00:00",
        "cluster.setup='module load cuda'",
        "name=big",
    )
    for line in (
        "#SBATCH --job-name=big",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=phys",
        "#SBATCH --time=1-00:00:00",
        "module load cuda",
        "export OMP_NUM_THREADS=3",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
    ):
        assert line in script.splitlines()
    for word in (
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
    ):
        assert word in script.replace(")", " ").split()
    assert "words=(name=big)" in script.splitlines()


def test_what_a_cluster_asks_for_becomes_directives():
    lines = script_of(
        "cluster=slurm",
        "cluster.qos=long",
        "cluster.constraint='a100&nvlink'",
        "cluster.mem=200G",
        "cluster.gres=gpu:h100:8",
        "cluster.directives=['mail-type=END,FAIL','exclude=n[3-5]',exclusive]",
    ).splitlines()
    for line in ("qos=long", "constraint=a100&nvlink", "mem=200G", "gres=gpu:h100:8",
                 "mail-type=END,FAIL", "exclude=n[3-5]", "exclusive"):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert not [line for line in lines if "gpus-per-node" in line]


def test_what_is_not_set_is_left_out():
    script = script_of("cluster=slurm", "device=cpu")
    for word in ("gpus", "partition", "account"):
        assert word not in script


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["cluster=local"], "cluster=local is this machine.*set cluster=slurm"),
        ([], "cluster=local"),
        (["cluster=slurm", "cluster.nodes=0"], "cluster.nodes must be positive, got 0"),
        (["cluster=slurm", "cluster.time=soon"], "cluster.time 'soon' is not a Slurm time limit"),
        (["cluster=slurm", "cluster.directives=['time=1']"], "'time=1' is set by cluster.time"),
        (["cluster=slurm", "cluster.directives=['--x y']"], "without their hyphens"),
        (["cluster=slurm", "cluster.mem=lots"], "cluster.mem must be a size, such as 200G"),
        (["cluster=slurm", "cluster.partition='a b'"], "cluster.partition 'a b' has a space"),
    ],
)
def test_bad_input_is_refused(told, message):
    with pytest.raises(UsageError, match=message):
        script_of(*told)


@bash
def test_overrides_reach_the_program_unchanged(tmp_path, monkeypatch):
    told = ("data.path='it is $HOME; \"x\"'", "optim.rest.betas=[0.9,0.95]", "name='a=b'")
    script = script_of("cluster=slurm", *told)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0

    stub(tmp_path, "scontrol", "printf 'first\\nsecond\\n'")
    stub(tmp_path, "srun", "printf '%s\\n' \"$@\"")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    ran = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=True)
    words = ran.stdout.splitlines()
    assert tuple(words[-3:]) == told
    assert "--rdzv-endpoint=first:23456" in words
    assert "--rdzv-id=123456" in words


@bash
def test_a_failing_setup_line_ends_the_job(tmp_path, monkeypatch):
    stub(tmp_path, "srun", "echo started")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    script = script_of("cluster=slurm", "cluster.setup='false'")
    ran = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
    assert ran.returncode != 0
    assert not ran.stdout


def test_dry_run_prints_and_submits_nothing(capsys):
    assert slurm.main(["cluster=slurm", "--dry-run", "experiment=first_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=first_run\n")


def test_without_sbatch_the_message_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.main(["cluster=slurm"]) == 2
    assert "sbatch is not installed" in capsys.readouterr().err


@bash
def test_sbatch_reads_the_file_and_its_status_is_ours(tmp_path, monkeypatch):
    got = tmp_path / "got"
    stub(tmp_path, "sbatch", f"cat > {got}\nexit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert slurm.main(["cluster=slurm", "seed=4"]) == 3
    assert got.read_text() == script_of("cluster=slurm", "seed=4")


RANKS = """
while [[ $1 == --* ]]; do shift; done
trap 'echo saved; exit ${FAILS:-1}' USR1 TERM
echo started
for i in $(seq 100); do sleep 0.05; done
echo finished
"""


@bash
@pytest.mark.row("R14")
@pytest.mark.parametrize(
    ("signals", "status", "said", "requeued"),
    [
        ([], 0, "started finished", False),
        ([signal.SIGUSR1], 1, "started saved", True),
        ([signal.SIGTERM, signal.SIGUSR1], 1, "started saved", True),
        ([signal.SIGTERM], 0, "started finished", False),
    ],
)
def test_the_warning_reaches_the_ranks_and_the_job_is_queued_again(
    tmp_path, monkeypatch, signals, status, said, requeued
):
    """srun passes signals on to its tasks; SIGTERM, which Slurm sends to all, ends no shell."""
    script = RANKS if signals else RANKS.replace("seq 100", "seq 5")
    stub(tmp_path, "srun", script.replace("seq 100", "seq 20" if not status else "seq 100"))
    stub(tmp_path, "scontrol", f"if [ $1 = requeue ]; then echo $2 > {tmp_path}/again; fi; echo n1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    file = tmp_path / "job.sh"
    file.write_text(script_of("cluster=slurm"))
    job = subprocess.Popen(["bash", str(file)], stdout=subprocess.PIPE, text=True)
    words = [job.stdout.readline().strip()]
    for number in signals:
        job.send_signal(number)
        time.sleep(0.1)
    words += job.communicate(timeout=20)[0].split()
    assert job.returncode == status
    assert " ".join(words[: len(said.split())]) == said
    assert (tmp_path / "again").exists() == requeued
    assert not requeued or (tmp_path / "again").read_text() == "77\n"


@bash
@pytest.mark.dist
def test_the_file_trains_when_srun_runs_on_this_machine(tmp_path, monkeypatch):
    stub(tmp_path, "scontrol", "echo localhost")
    stub(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    script = script_of(
        "cluster=slurm",
        "cluster.ranks_per_node=2",
        "cluster.cpus_per_rank=1",
        *SMALLEST,
        f"output={tmp_path}",
    )
    ran = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, check=False, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run" / "report.json").is_file()


@bash
def test_a_sweep_is_one_array_and_each_task_gets_its_own_words(tmp_path, monkeypatch):
    got = tmp_path / "got"
    stub(tmp_path, "sbatch", f"cat > {got}")
    stub(tmp_path, "scontrol", "echo n1")
    stub(tmp_path, "srun", "printf '%s\\n' \"$@\"")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    told = [*SMALLEST, "parallel=ddp", f"output={tmp_path}", "sweep=lr", "sweep.parallel_jobs=2"]
    told += ["+sweep.grid={optim.lr:[0.01,0.02],seed:[0,1]}", "cluster=slurm", "name=it"]
    done = tmp_path / "it-lr=0.01,seed=1" / "report.json"
    done.parent.mkdir()
    done.write_text("{}")
    assert sweep.main([*told, "cluster.ranks_per_node=2"]) == 0
    lines = got.read_text().splitlines()
    assert "#SBATCH --array=0-2%2" in lines and "#SBATCH --output=%x-%A_%a.log" in lines
    found = []
    for task in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        monkeypatch.setenv("SLURM_JOB_ID", str(100 + task))
        ran = subprocess.run(
            ["bash", str(got)], text=True, capture_output=True, check=True, timeout=20
        )
        words = ran.stdout.splitlines()
        assert f"--rdzv-id={100 + task}" in words and "--nproc-per-node=2" in words
        assert not [word for word in words if word.startswith(("cluster", "sweep"))]
        found.append([word for word in words if word.startswith(("optim.lr=", "seed=", "name="))])
    assert [point[-3:] for point in found] == [
        ["optim.lr=0.01", "seed=0", 'name="it-lr=0.01,seed=0"'],
        ["optim.lr=0.02", "seed=0", 'name="it-lr=0.02,seed=0"'],
        ["optim.lr=0.02", "seed=1", 'name="it-lr=0.02,seed=1"'],
    ]


@bash
@pytest.mark.parametrize(("status", "trains"), [(0, True), (1, False)])
def test_ranks_that_do_not_agree_train_nothing(tmp_path, monkeypatch, status, trains):
    stub(tmp_path, "scontrol", "echo n1")
    stub(
        tmp_path,
        "srun",
        f'case "$*" in *check_ranks*) echo checked; exit {status};; *) echo trained;; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    script = script_of("cluster=slurm", preflight=True)
    ran = subprocess.run(["bash"], input=script, text=True, capture_output=True, check=False)
    assert ran.stdout.split() == ["checked"] + ["trained"] * trains
    assert ran.returncode == (0 if trains else 2)
