"""A run that is asked to stop loses no step."""

import json
import os
import random
import signal
import subprocess

import pytest
import torch

from geon.engine import main as engine
from geon.engine.trainer import Callback
from geon.errors import Preempted
from geon.launch import signals
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.local import torchrun_command
from tests.distributed.jobs import weights
from tests.launch.jobs import SMALLEST

STEPS = 40
TINY = [
    *(*SMALLEST, "data.val_tokens=2048", f"schedule.steps={STEPS}", "eval.batch=1"),
    *("checkpoint.every=0", "logger.progress=false"),
]


class SignalAt(Callback):
    """Sends this process a signal at a step, in the midst of it."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def before_update(self, trainer):
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def listening():
    was = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    signals.listen()
    yield
    signals.training(False)
    for number, handler in was.items():
        signal.signal(number, handler)


def train(output, name, *more, callback=None):
    config = compose([*TINY, f"output={output}", f"name={name}", "parallel=single", *more])
    made = engine._callbacks

    def callbacks(config):
        return [*([callback] if callback else []), *made(config)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_callbacks", callbacks)
        engine.execute(config, Env())


def rows(folder, kind):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in read if row["kind"] == kind]


def same(a, b):
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    train(folder, "calm")
    return folder / "calm"


@pytest.mark.row("R14")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_step_is_lost_and_the_resumed_run_is_bitwise_the_same(calm, tmp_path, listening, number):
    step = random.Random(int(number)).randrange(1, STEPS - 1)
    with pytest.raises(Preempted, match=f"step {step + 1} is saved"):
        train(tmp_path, "run", callback=SignalAt(step, number))
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == [f"step-{step + 1:07d}"]
    train(tmp_path, "run")
    assert same(calm, tmp_path / "run")


@pytest.mark.row("R14")
def test_a_signal_ends_an_evaluation_between_its_batches(calm, tmp_path, listening):
    class InEvaluation(Callback):
        def on_step(self, trainer):
            if trainer.step == 10:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="step 10 is saved"):
        train(tmp_path, "run", "eval.every=10", callback=InEvaluation())
    assert rows(tmp_path / "run", "eval") == []  # 64 batches; it was left in their midst
    train(tmp_path, "run", "eval.every=0")
    assert same(calm, tmp_path / "run")


@pytest.mark.row("R14")
def test_after_the_last_step_the_evaluation_is_left_to_the_next_start(calm, tmp_path, listening):
    with pytest.raises(Preempted, match=f"step {STEPS} is saved"):
        train(tmp_path, "run", callback=SignalAt(STEPS - 1, signal.SIGTERM))
    assert same(calm, tmp_path / "run")
    train(tmp_path, "run")
    assert rows(tmp_path / "run", "eval") and (tmp_path / "run" / "report.json").is_file()
    assert same(calm, tmp_path / "run")


def torchrun(output, name, *more, restarts=0):
    arguments = [*TINY, f"output={output}", f"name={name}", "parallel=fsdp", "logger.every=1"]
    command = torchrun_command(2, [*arguments, "logger.progress=true", "schedule.steps=400", *more])
    command.insert(4, f"--max-restarts={restarts}")
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def at_step(process, step):
    """Read what a run prints until it has taken a step; then a rank other than the first."""
    from geon.benches.chaos import ranks_of

    for line in process.stdout:
        if line.startswith(f"step {step}:"):
            return ranks_of(process.pid)[1]
    raise AssertionError("it ended before")


@pytest.fixture(scope="module")
def calm_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm-ranks")
    process = torchrun(folder, "calm")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return folder / "calm"


@pytest.mark.row("R14")
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_torchrun_saves_one_step_on_all_ranks(calm_ranks, tmp_path, number):
    process = torchrun(tmp_path, "run")
    at_step(process, random.Random(int(number)).randrange(20, 200))
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own; its ranks leave with 75
    assert said.count("geon: asked to stop: step ") == 1, said
    process = torchrun(tmp_path, "run")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "resuming from" in said
    assert same(calm_ranks, tmp_path / "run")


@pytest.mark.row("R14")
@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all_and_torchrun_goes_on(calm_ranks, tmp_path):
    process = torchrun(tmp_path, "run", restarts=1)
    os.kill(at_step(process, 77), signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("geon: asked to stop: step ") == 1, said
    assert "resuming from" in said
    assert same(calm_ranks, tmp_path / "run")
