"""The bench of training: what it splits a step into, and what it holds the step against."""

import json
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from geon.benches import loop as bench_loop
from geon.benches import train as bench_train
from geon.data import Batches
from geon.engine.main import prepare
from geon.engine.parallel import Parallel
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.local import torchrun_command
from geon.models import GPT
from geon.optim import HybridOptimizer
from tests.distributed.jobs import launch
from tests.launch.jobs import SMALLEST

RUN = [word for word in SMALLEST if not word.startswith("schedule")]
TINY = [*RUN, "parallel=single"]
KEYS = {
    "tokens_per_second", "track3_tokens_per_second", "tokens_per_second_over_track3", "mfu",
    "peak_memory_bytes", "seconds", "overhead_share", "seconds_to_first_step", "meta",
}  # fmt: skip
NAP = 0.03


def measured(tmp_path, *options):
    out = tmp_path / "out.json"
    few = ("--steps", "3", "--warmup", "1", "--rounds", "3")
    assert bench_train.main([*TINY, *few, "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_the_result_has_every_field_and_its_parts_are_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "peak_flops", lambda device: 1e9)
    found = measured(tmp_path, "--track3", "2s")
    assert set(found) == KEYS
    assert set(found["meta"]) == {"hardware", "versions", "command", "date"}
    assert str(tmp_path) not in found["meta"]["command"]
    assert "benches.train data=synthetic" in found["meta"]["command"]
    assert found["seconds"].pop("exchange") == 0.0
    assert set(found["seconds"]) == {"data", "forward", "backward", "optimizer"}
    assert all(value > 0.0 for value in found["seconds"].values())
    # Medians of parts and the median of the sums differ by noise.
    rate = found["tokens_per_second"]
    assert sum(found["seconds"].values()) == pytest.approx(256 / rate, rel=0.3)
    assert found["track3_tokens_per_second"] == 128.0
    assert found["tokens_per_second_over_track3"] == pytest.approx(rate / 128, rel=1e-4)
    # 1 layer of width 32: 12 x 32^2 hidden weights, a head of 64 ids; attention over 32 tokens.
    per_token = 6 * (12 * 32**2 + 64 * 32) + 12 * 32 * 32
    assert found["mfu"] == pytest.approx(rate * per_token / 1e9, rel=1e-4)
    assert found["seconds_to_first_step"] > 0.0
    assert 50 << 20 < found["peak_memory_bytes"] < 50 << 30


def test_labels_share_a_file(tmp_path):
    measured(tmp_path, "--label", "a")
    found = measured(tmp_path, "--label", "b", "optim=muon")
    assert set(found["arms"]) == {"a", "b"} and all(set(a) == KEYS for a in found["arms"].values())
    found = measured(tmp_path)
    assert set(found) == KEYS | {"arms"} and set(found["arms"]) == {"a", "b"}


def slowed(monkeypatch, owner, name):
    inner = getattr(owner, name)

    def slow(self, *args, **kwargs):
        time.sleep(NAP)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("owner", "name", "phase", "added"),
    [
        (Batches, "windows_at", "data", True),
        (GPT, "hidden", "forward", False),
        (Parallel, "backward", "backward", True),
        (HybridOptimizer, "step", "optimizer", False),
        (HybridOptimizer, "set_lr", "data", True),
    ],
)
def test_a_planted_nap_shows_where_it_is(monkeypatch, owner, name, phase, added):
    """Naps of the model and of the optimizer are the plain loop's too; the others the trainer's."""
    slowed(monkeypatch, owner, name)
    one = bench_loop.watched(TINY)
    one.step()
    steps = one.phases(3)
    assert len(steps) == 3
    assert all(step[phase] >= NAP for step in steps)
    assert min(sum(step.values()) - step[phase] for step in steps) < NAP
    one.plain()
    over = statistics.median(one.overhead(9) for _ in range(3)) * min(
        bench_loop.seconds(one.plain, one.timeline.device) for _ in range(3)
    )
    assert (over > 0.5 * NAP) == added


def test_the_plain_loop_has_the_gradients_of_the_step():
    one = bench_loop.watched([*TINY, "data.micro_batch=2"])
    run = one.trainer.run
    run.parallel.update = lambda optimizer: None
    one.step()
    assert len(one.micros) == 4
    stepped = {name: param.grad.clone() for name, param in run.model.named_parameters()}
    run.optimizer.zero_grad()
    one.gradients()
    for name, param in run.model.named_parameters():
        torch.testing.assert_close(param.grad, stepped[name], rtol=0, atol=0)


def test_a_watched_trainer_trains_as_one_that_is_not():
    one = bench_loop.watched(TINY)
    one.phases(3)
    config = compose([*TINY, "schedule=constant", "checkpoint=none"])
    other, _ = prepare(config, Env(), [])
    for _ in range(3):
        other.train_step()
    pairs = zip(one.trainer.run.model.parameters(), other.run.model.parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)


def test_collectives_of_the_optimizer_are_exchange(monkeypatch):
    def nap(*args, **kwargs):
        time.sleep(NAP)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", nap)
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_: SimpleNamespace(wait=nap))
    timeline = bench_loop.Timeline(torch.device("cpu"))
    timeline.on = True
    with bench_loop._exchange_timed(timeline):
        timeline.mark("data", first=True)
        dist.all_reduce()
        with timeline.within("optimizer"):
            work = dist.all_to_all_single()
            dist.all_reduce()
            time.sleep(NAP)
            work.wait()
        timeline.mark("data", first=True)
    (found,) = timeline.read()
    assert dist.all_reduce is nap
    # The parts do not overlap, so that none can hold another's naps.
    assert found["exchange"] >= 2 * NAP
    assert found["optimizer"] >= NAP and found["data"] >= NAP


def test_events_of_a_gpu_are_read_in_milliseconds(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 11.0, 15.0])

    class Event:
        def __init__(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(bench_loop.Timeline, "_now", lambda self: Event())
    timeline = bench_loop.Timeline(torch.device("cpu"))
    timeline.on = True
    timeline.mark("data", first=True)
    with timeline.within("forward"):
        pass
    timeline.mark("data", first=True)
    timeline.mark("data", first=True)
    first, second = timeline.read()
    assert first == pytest.approx(
        {"data": 0.005, "forward": 0.006, "backward": 0, "optimizer": 0, "exchange": 0}
    )
    assert second["data"] == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["schedule.steps=5"], "schedule.steps=5"),
        (["sweep=lr"], "sweep=lr"),
        (["+logger.every=5"], "logger.every"),
        (["--label", "a"], "--label goes with --json"),
        (["--track3", "fast"], "--track3 'fast'"),
        (["--track3", "0"], "--track3 '0'"),
        (["--json", "no/such/out.json"], "no folder"),
        (["modle=gpt"], "modle"),
    ],
)
def test_bad_input_is_one_message(options, told, capsys):
    assert bench_train.main([*TINY, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geon: error: ") and told in error and error.count("\n") == 1


@pytest.mark.dist
def test_two_ranks_wait_for_the_exchange(tmp_path):
    out = tmp_path / "out.json"
    options = ["parallel=fsdp", "--steps", "2", "--warmup", "0", "--json", str(out)]
    done = launch(torchrun_command(2, [*RUN, *options], bench_train.__file__), 120)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["seconds"]["exchange"] > 0.0
    assert found["overhead_share"] is None
    assert done.stdout.count("tokens/s") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_parts_are_the_wall_clock():
    words = [word for word in TINY if not word.startswith("device")]
    one = bench_loop.watched([*words, "device=cuda"])
    device = one.timeline.device
    for _ in range(3):
        one.step()
    found = []
    wall = bench_loop.seconds(lambda: found.extend(one.phases(5)), device)
    assert sum(sum(step.values()) for step in found) == pytest.approx(wall, rel=0.3)
    assert all(step["forward"] > 0.0 and step["exchange"] == 0.0 for step in found)


def test_a_number_of_steps_has_a_range(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_train.main([*TINY, "--steps", "0"])
    assert "--steps: 0 is not between 1" in capsys.readouterr().err
