import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from omegaconf import OmegaConf

from geon.configs.changes import plain
from geon.errors import UsageError
from geon.launch import sweep
from geon.launch.local import ROOT
from tests.launch.jobs import SMALLEST

TINY = ["sweep=lr", *SMALLEST, "parallel=single"]


def overrides(tmp_path, grid="{optim.lr:[0.01,0.02]}", *more):
    return [*TINY, f"output={tmp_path}", f"+sweep.grid={grid}", *more]


def jobs_of(told):
    return sweep.expand(sweep.compose(told), told)


def test_import_costs_the_standard_library_only():
    code = "import sys, geon.launch.sweep, geon.launch.slurm; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "hydra", "omegaconf", "numpy"} & set(loaded)


def test_jobs_are_the_product_with_unique_names(tmp_path):
    grid = "{optim.lr:[0.01,0.02],seed:[0,1],optim.hidden.momentum:[0.9],optim.rest.momentum:[0.8]}"
    jobs = jobs_of(overrides(tmp_path, grid))
    assert [job.name for job in jobs] == [
        f"run-lr={lr},seed={seed},optim.hidden.momentum=0.9,optim.rest.momentum=0.8"
        for lr in (0.01, 0.02)
        for seed in (0, 1)
    ]
    assert jobs[0].folder == tmp_path / jobs[0].name
    assert jobs[0].log == tmp_path / f"{jobs[0].name}.log"


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ({"model/size": "tiny", "optim": "muon"}, "run-size=tiny,optim=muon"),
        ({"data.path": "a b/ä"}, "run-path=a-b--"),
        ({"parallel.compile": True, "optim.lr": 1e-05}, "run-compile=true,lr=1e-05"),
    ],
)
def test_names_are_fit_for_folders(point, name):
    assert sweep.job_name("run", point) == name


def test_every_kind_of_value_reaches_the_config(tmp_path):
    grid = (
        "{model/size:[124m],optim:[muon],data.path:['a \"b\" c'],parallel.compile:[true],"
        "optim.lr:[1e-05],optim.rest.betas:[[0.8,0.9]]}"
    )
    told = [f"output={tmp_path}", "sweep=lr", f"+sweep.grid={grid}"]
    (job,) = jobs_of(told)
    config = sweep.compose(job.arguments)
    assert (config.model.n_layer, config.optim.name) == (12, "muon")
    assert (config.data.path, config.parallel.compile) == ('a "b" c', True)
    assert (config.optim.lr, config.optim.rest.betas) == (1e-05, [0.8, 0.9])
    assert config.name == job.name


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{optim.lrr:[1]}", "unknown config key 'optim.lrr'.*Did you mean 'optim.lr'"),
        ("{optim:[mun]}", "'mun' is not an option of optim.*Did you mean 'muon'"),
        ("{schedule.steps:[few]}", "schedule.steps=.*few.*could not be converted to Integer"),
        ("{schedule.steps:[0]}", "schedule.steps must be positive, got 0"),
        ("{seed:[]}", "'seed' no values"),
        ("{seed:[1,1]}", "two jobs named"),
        ("{cluster.ranks_per_node:[0]}", "cluster.ranks_per_node must be positive"),
    ],
)
def test_a_bad_grid_is_refused_before_any_job(tmp_path, grid, message):
    with pytest.raises(UsageError, match=message):
        jobs_of(overrides(tmp_path, grid))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("sweep=none", "sweep=none has no grid: choose one with sweep=lr"),
        ("seed=[1", "cannot read override 'seed=[1'"),
        ("cluster.nodes=2", "cluster.nodes must be 1"),
        ("sweep.parallel_jobs=-1", "sweep.parallel_jobs must be 0 or more, got -1"),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, capsys, more, message):
    assert sweep.main([f"output={tmp_path}", "--dry-run", "sweep=lr", more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_places_share_threads_and_gpus():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert sweep.share(1, 0, 1, ["0", "1"]) == {"OMP_NUM_THREADS": str(cores)}
    assert sweep.share(1, 0, 4 * cores, []) == {"OMP_NUM_THREADS": "1"}
    taken = [sweep.share(2, place, 3, list("0123"))["CUDA_VISIBLE_DEVICES"] for place in range(3)]
    assert taken == ["0,1", "2,3", "0,1"]
    assert "CUDA_VISIBLE_DEVICES" not in sweep.share(4, 0, 2, ["0", "1"])


def test_dry_run_lists_command_lines_and_runs_nothing(tmp_path, capsys):
    told = overrides(tmp_path, "{optim.lr:[0.01]}", "cluster.ranks_per_node=2", "parallel=ddp")
    assert sweep.main([*told, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "to run    run-lr=0.01,seed=0" in out
    assert "--nproc_per_node=2" in out
    assert "optim.lr=0.01 seed=0 'name=\"run-lr=0.01,seed=0\"'" in out
    assert not list(tmp_path.iterdir())


def run_sweep(told):
    line = [sys.executable, "-m", "geon.launch.sweep", *told]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.dist
def test_a_failure_stops_no_other_job_and_a_second_sweep_runs_only_what_is_left(tmp_path):
    bad, good = "run-lr=1e+30,seed=0", "run-lr=0.01,seed=0"
    grid = "{optim.lr:[1e30,0.01]}"
    adamw = ("optim=adamw", "optim.hidden.weight_decay=0", "optim.head.weight_decay=0")
    first = run_sweep(overrides(tmp_path, grid, "sweep.parallel_jobs=2", *adamw))
    assert first.returncode == 1, first.stderr
    assert f"job {bad} failed with exit status 1; {tmp_path / bad}.log ends:" in first.stderr
    report = json.loads((tmp_path / good / "report.json").read_text())
    assert f"{report['val_nats_per_token']:.4f} nats/token" in first.stdout

    written = (tmp_path / good / "report.json").stat().st_mtime_ns
    again = run_sweep(overrides(tmp_path, "{optim.lr:[0.01]}", *adamw))
    assert again.returncode == 0, again.stderr
    assert f"skipped   {good}: finished before" in again.stdout
    assert "started" not in again.stdout
    assert f"{report['val_nats_per_token']:.4f} nats/token" in again.stdout
    assert (tmp_path / good / "report.json").stat().st_mtime_ns == written

    other = run_sweep(overrides(tmp_path, "{optim.lr:[0.01]}", *adamw, "schedule.steps=3"))
    assert other.returncode == 2
    assert "finished run with schedule.steps=2, this sweep has 3" in other.stderr


def test_a_job_that_cannot_start_is_found_before_any_is_started(tmp_path):
    done = run_sweep(overrides(tmp_path, "{optim.lr:[0.01],data.micro_batch:[0,7]}"))
    assert done.returncode == 2
    assert "micro_batch=7" in done.stderr
    assert "data.batch_tokens 256 is not a multiple" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_whose_vocabulary_followed_the_data_is_known_again(tmp_path):
    told = overrides(tmp_path, "{optim.lr:[0.01]}", "data=bins", "data.dir=shards")
    told = [word for word in told if not word.startswith(("data=synthetic", "data.tokens"))]
    (job,) = jobs_of(told)
    job.folder.mkdir()
    settings = plain(asdict(sweep.compose(job.arguments)))
    settings["data"]["vocab_size"] = settings["model"]["vocab_size"] = 4096
    OmegaConf.save(OmegaConf.create(settings), job.folder / "config.yaml")
    (job.folder / "report.json").write_text("{}")
    assert jobs_of(told)[0].report == {}
    with pytest.raises(UsageError, match=r"data\.vocab_size=4096, this sweep has 512"):
        jobs_of([*told, "data.vocab_size=512"])


@pytest.mark.parametrize("done", [True, False])
def test_a_job_that_ran_with_other_settings_is_refused_finished_or_half(tmp_path, done):
    told = overrides(tmp_path, "{optim.lr:[0.01]}", "optim=muon")
    (job,) = jobs_of(told)
    job.folder.mkdir()
    settings = plain(asdict(sweep.compose(job.arguments)))
    OmegaConf.save(OmegaConf.create(settings), job.folder / "config.yaml")
    if done:
        (job.folder / "report.json").write_text("{}")
    half = "a finished" if done else "half of a"
    for change, there in (("optim.hidden.momentum=0.5", "0.95"), ("schedule.steps=3", "2")):
        key, here = change.split("=")
        with pytest.raises(UsageError, match=f"{half} run with {key}={there}, .* has {here}"):
            jobs_of([*told, change])
    jobs_of([*told, "logger.every=3", "device=auto"])
    for regardless in ("checkpoint.allow_change=[optim]", "checkpoint.resume=never"):
        more = [*told, "optim.hidden.momentum=0.5", regardless]
        if done:
            with pytest.raises(UsageError, match="a finished run"):
                jobs_of(more)
        else:
            jobs_of(more)


@pytest.mark.dist
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals")
def test_jobs_under_way_end_with_the_sweep(tmp_path):
    told = overrides(tmp_path, "{optim.lr:[0.01]}", "schedule.steps=1000000")
    line = [sys.executable, "-m", "geon.launch.sweep", *told]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL)
    log = tmp_path / "run-lr=0.01,seed=0.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "ranks on" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    metrics = tmp_path / "run-lr=0.01,seed=0" / "metrics.jsonl"
    size = metrics.stat().st_size
    time.sleep(1.0)
    assert metrics.stat().st_size == size


ARMS = (
    "+sweep.arms={a: {overrides: ['optim=muon'], grid: {optim.lr: [0.1, 0.2]}}, "
    "b: {overrides: ['optim=adamw', 'optim.hidden.weight_decay=0.5']}, gone: null}"
)


def test_arms_have_settings_and_values_of_their_own(tmp_path):
    told = overrides(tmp_path, "{optim.lr:[0.01],seed:[0,1]}", ARMS, "schedule.steps=3")
    jobs = jobs_of(told)
    assert [(job.arm, job.point["optim.lr"], job.point["seed"]) for job in jobs] == [
        *(("a", lr, seed) for lr in (0.1, 0.2) for seed in (0, 1)),
        *(("b", 0.01, seed) for seed in (0, 1)),
    ]
    assert jobs[-1].name == "run-b-lr=0.01,seed=1"
    first, last = (sweep.compose(job.arguments) for job in (jobs[0], jobs[-1]))
    assert (first.optim.name, first.optim.lr, first.schedule.steps) == ("muon", 0.1, 3)
    assert (last.optim.name, last.optim.hidden.weight_decay) == ("adamw", 0.5)
    assert last.sweep.name == "none"


def test_what_is_given_beside_a_sweep_wins_over_what_it_shares(tmp_path):
    shared = "+sweep.overrides=['schedule.steps=7', 'optim=muon']"
    (job,) = jobs_of(overrides(tmp_path, "{optim.lr:[0.01]}", shared, "schedule.steps=5"))[:1]
    config = sweep.compose(job.arguments)
    assert (config.schedule.steps, config.optim.name) == (5, "muon")


def test_a_bad_arm_is_named(tmp_path):
    bad = "+sweep.arms={a: {overrides: ['optim=mun']}}"
    with pytest.raises(UsageError, match="arm a at .*'mun' is not an option of optim"):
        jobs_of(overrides(tmp_path, "{optim.lr:[0.01]}", bad))
    with pytest.raises(UsageError, match="sweep.arms.a.gird"):
        jobs_of(overrides(tmp_path, "{optim.lr:[0.01]}", "+sweep.arms={a: {gird: {}}}"))


@pytest.mark.parametrize(
    "name",
    ["width_lr", "width_lr_gpu", "leaderboard"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("recipe", "horizon")],
)
def test_the_arms_of_every_study_compose(name, tmp_path):
    config = sweep.compose([f"sweep={name}"])
    for arm, settings in config.sweep.arms.items():
        grid = {**config.sweep.grid, **settings.grid}
        point = {key: values[-1] for key, values in grid.items()}
        job = sweep.make_job(config, [f"output={tmp_path}"], arm, point)
        assert job.folder.parent == tmp_path
        assert len(grid["optim.lr"]) == len(set(grid["optim.lr"]))
    if name == "leaderboard":
        lengths = {
            len({**config.sweep.grid, **settings.grid}["optim.lr"])
            for settings in config.sweep.arms.values()
        }
        assert lengths == {5}, "every optimizer searches as many rates"
