"""A sweeper of another package: a plugin made here proposes values and is told the objectives."""

import json
import os
import subprocess
import sys

import pytest

from geon.errors import UsageError
from geon.launch import runs
from geon.launch.compose import compose, jobs, told_apart
from geon.launch.local import ROOT
from geon.launch.trials import Sweep
from tests.launch.jobs import SMALLEST

PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
import json

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


@dataclass
class Fake:
    _target_: str = "hydra_plugins.fake.FakeSweeper"
    out: str = ""


ConfigStore.instance().store(group="hydra/sweeper", name="fake", node=Fake, provider="fake")


class FakeSweeper(Sweeper):
    def __init__(self, out):
        self.out = out

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        fixed = [word for word in arguments if "interval" not in word]
        found = []
        for i, lr in enumerate((0.0123456, 1e30)):
            batch = [[*fixed, f"optim.lr={lr}"]]
            (done,) = self.launcher.launch(batch, initial_job_idx=i)
            found.append(done.return_value)
        Path(self.out).write_text(json.dumps({"arguments": arguments, "found": found}))
"""


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "plugins" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins" / "hydra_plugins" / "fake.py").write_text(PLUGIN)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "plugins")])}


def train(folder, environment, *words):
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.dist
def test_a_sweeper_is_told_each_runs_last_validation_loss(tmp_path, plugin):
    told = ["-m", *SMALLEST, "parallel=single", "optim=adamw", "eval.every=1", "name=opt"]
    told += ["optim.hidden.weight_decay=0", "optim.head.weight_decay=0"]
    own = ["hydra/sweeper=fake", f"hydra.sweeper.out={tmp_path / 'out.json'}"]
    done = train(tmp_path, plugin, *told, *own, "optim.lr=interval(0.001,0.1)")
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "out.json").read_text())["found"]
    (folder,) = (tmp_path / "runs").glob("opt-0-*")
    assert folder.name == "opt-0-lr=0.01235"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_nats_per_token"] for row in rows if row["kind"] == "eval"]
    assert len(losses) == 2 and first == losses[-1]
    assert json.loads((folder / "report.json").read_text())["objective"] == first
    assert "optim.lr=0.0123456\n" in (folder / "overrides.txt").read_text()
    assert second == float("inf"), "numbers that are not finite end a trial, not the sweep"
    assert "best of 2 trials" in done.stdout and not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra/sweeper=nosuch", "seed=0,1"], "nosuch.*package of its own"),
        (["hydra/launcher=joblib", "seed=0,1"], "Hydra's own settings"),
        (["hydra.sweeper.params._target_=os.system", "seed=0,1"], "by name"),
        (["hydra/sweeper=basic,fake"], "give it one"),
    ],
)
def test_what_a_multirun_does_not_take_is_one_message(words, message):
    with pytest.raises(UsageError, match=message):
        Sweep([*SMALLEST, *words])


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: os.getcwd}}}",
        "hydra: {launcher: {_target_: os.getcwd}}",
        "hydra: {sweeper: {_target_: os.getcwd}}",
    ],
)
def test_a_config_file_makes_nothing_by_name_in_a_multirun(tmp_path, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(UsageError, match="by name"):
        Sweep([f'hydra.searchpath=["{tmp_path}"]', "experiment=bad", "seed=0,1"])


def test_values_of_a_file_make_the_jobs_of_a_multirun(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "grid.yaml"
    file.write_text(
        "# @package _global_\nhydra: {sweeper: {params: {seed: '3,4', eval.batch: 8}}}\n"
    )
    found = Sweep([f'hydra.searchpath=["{tmp_path}"]', "experiment=grid", "eval.batch=16"])
    assert not found.plugin
    assert [name for name, _ in jobs(found.words)] == ["seed=3", "seed=4"]
    assert "eval.batch=8" not in found.words, "what is typed wins"


def test_jobs_of_a_multirun_never_share_a_name():
    names = [name for name, _ in jobs(["data.path='a b','a-b'"])]
    assert len(set(names)) == 2
    long = [told_apart(["a" * 50, "b"], ["x" * 60, value]) for value in ("1", "2")]
    assert len(set(long)) == 2 and max(map(len, long)) <= 80


def test_runs_of_an_agent_are_named_by_their_ids(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "ab12")
    found = []
    execute = lambda config, words: found.append((config.name, words))  # noqa: E731
    runs.single([*SMALLEST, "name=tune", "optim.lr=0.02"], lambda: (None, execute))
    ((name, words),) = found
    assert name == "tune-ab12" and "optim.lr=0.02" in words


def test_words_as_an_agent_writes_them_are_taken():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = {"optim.lr": 1e-05, "data.shuffle": False, "optim": "muon", "seed": 3,
              "optim.head.betas": [0.8, 0.9], "eval.sample_prompt": "a b"}  # fmt: skip
    told = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})
    config = compose([*told["args_no_hyphens"], "eval.sample_tokens=4"], "train")
    assert (config.optim.lr, config.optim.name, config.seed) == (1e-05, "muon", 3)
    assert (config.data.shuffle, config.eval.sample_prompt) == (False, "a b")
    assert config.optim.head.betas == [0.8, 0.9]


def test_words_with_hyphens_are_told_how_to_write():
    from geon.launch.arguments import read_arguments

    assert read_arguments(["optim.lr=0.01", "seed=3"]).overrides == ["optim.lr=0.01", "seed=3"]
    with pytest.raises(UsageError, match=r"args_no_hyphens"):
        read_arguments(["--optim.lr=0.01"])


@pytest.mark.dist
def test_a_shell_completes_options(tmp_path):
    line = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "python train.py optim=mu"}
    done = train(tmp_path, line, "-sc", "query=bash")
    assert done.stdout.split() == ["optim=muon", "optim=muonh"], done.stderr
