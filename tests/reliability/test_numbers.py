"""Bad numbers: found at the step that makes them, on every rank, and what the run then does."""

import json
import math

import pytest
import torch

from geon.engine import checkpoint, main
from geon.engine.trainer import Callback
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.local import ROOT
from geon.optim import hybrid
from tests.distributed.jobs import by_file, distance, metrics, weights
from tests.launch.jobs import SMALLEST
from tests.reliability.numbers_job import SHAPES, feed, make

TINY = [
    *(*SMALLEST, "parallel=single", "optim=muon", "data.val_tokens=1024", "schedule.steps=12"),
    *("logger.every=50", "logger.progress=false"),
]


def snap(optimizer):
    held = {name: param.detach().clone() for name, param in optimizer.named_parameters()}
    return held | {key: one.clone() for key, one in optimizer.state_tensors().items()}


class Fault(Callback):
    """Spoils gradients before the updates of some data positions, and looks on."""

    def __init__(self, positions=(), bad=math.nan, once=False):
        self.positions, self.bad, self.once = set(positions), bad, once
        self.before, self.same, self.seen = {}, {}, []

    def on_start(self, trainer):
        self.trainer = trainer

    def before_update(self, trainer):
        self.seen.append(trainer.step)
        if trainer.step in self.positions:
            self.before[trainer.step] = snap(trainer.run.optimizer)
            self.norms = dict(trainer.run.optimizer.watch.norms)
            trainer.run.model.get_parameter("blocks.0.up.weight").grad[1, 2] = self.bad
            if self.once:
                self.positions.discard(trainer.step)

    def on_step(self, trainer):
        if was := self.before.get(trainer.step - 1):
            now = snap(trainer.run.optimizer)
            alike = all(torch.equal(was[key], now[key]) for key in was)
            alike &= self.norms == trainer.run.optimizer.watch.norms
            self.same[trainer.step - 1] = alike


def run(folder, monkeypatch, fault, *overrides):
    """A small run in this process with one more callback; returns the callback."""
    usual = main._callbacks
    with monkeypatch.context() as patch:
        patch.setattr(main, "_callbacks", lambda config: [*usual(config), fault])
        config = compose([*TINY, f"output={folder.parent}", f"name={folder.name}", *overrides])
        main.train(config, Env())
    return fault


@pytest.mark.row("R20")
def test_a_bad_loss_stops_the_run_whenever_it_is_logged(tmp_path, monkeypatch):
    class Loss(Fault):
        def on_start(self, trainer):
            parallel = trainer.run.parallel
            usual = parallel.loss
            parallel.loss = lambda *pair: usual(*pair) * (math.nan if trainer.step == 4 else 1.0)

    with pytest.raises(FloatingPointError, match=r"^step 5: the loss .*; there is no checkpoint$"):
        run(tmp_path / "n", monkeypatch, Loss())
    assert not (tmp_path / "n" / "report.json").exists()
    with pytest.raises(FloatingPointError, match=r"the newest checkpoint is .*step-0000004$"):
        run(tmp_path / "c", monkeypatch, Loss(), "checkpoint.every=4")


@pytest.mark.row("R20")
@pytest.mark.parametrize("recipe", ["muon", "hybrid", "adamw", "sgd"])
def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, monkeypatch, recipe):
    options = [f"optim={recipe}", "health.policy=skip", "logger.every=3"]
    fault = run(tmp_path / "s", monkeypatch, Fault([5, 8], math.inf), *options)
    assert fault.same == {5: True, 8: True}
    assert fault.trainer.step == 12 and fault.trainer.health.skipped == [5, 8]
    assert metrics(tmp_path / "s", "train")[-1]["skipped"] == [5, 8]
    assert [row["position"] for row in metrics(tmp_path / "s", "skip")] == [5, 8]
    facts = checkpoint.read_commit(checkpoint.find(tmp_path / "s"))
    assert facts["skipped"] == [5, 8]


@pytest.mark.row("R20")
def test_skips_in_a_row_are_limited(tmp_path, monkeypatch):
    options = ["health.policy=skip", "health.max_skips=2"]
    fault = Fault([3, 4, 6, 7, 8])
    with pytest.raises(FloatingPointError, match=r"^step 9: .* 2 steps in a row .*max_skips"):
        run(tmp_path / "s", monkeypatch, fault, *options)
    assert fault.same == {3: True, 4: True, 6: True, 7: True}


@pytest.mark.row("R20")
def test_a_rewound_run_is_one_that_left_the_step_out(tmp_path, monkeypatch):
    options = ["checkpoint.every=4", "logger.every=1"]
    fault = Fault([6], once=True)
    run(tmp_path / "r", monkeypatch, fault, *options, "health.policy=rewind")
    assert fault.seen == [0, 1, 2, 3, 4, 5, 6, 4, 5, 7, 8, 9, 10, 11]
    run(tmp_path / "s", monkeypatch, Fault([6]), *options, "health.policy=skip")
    assert distance(weights(tmp_path / "r"), weights(tmp_path / "s")) == 0.0
    steps = [row["step"] for row in metrics(tmp_path / "r", "train")]
    assert steps == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    (row,) = metrics(tmp_path / "r", "rewind")
    assert (row["position"], row["to"]) == (6, 4)


@pytest.mark.row("R20")
def test_rewinds_are_limited_and_need_a_checkpoint(tmp_path, monkeypatch):
    options = ["health.policy=rewind", "checkpoint.every=4", "health.max_rewinds=1"]
    with pytest.raises(FloatingPointError, match="step 2: .*no checkpoint to go back to"):
        run(tmp_path / "a", monkeypatch, Fault([1]), *options)
    with pytest.raises(FloatingPointError, match=r"step 8: .* went back 1 times before"):
        run(tmp_path / "b", monkeypatch, Fault([5, 7]), *options)


def spoil(monkeypatch, step, key, name="blocks.0.up.weight", bad=math.nan):
    """Have the optimizer's update itself make a bad number in one of its steps."""
    usual, taken = hybrid.glance, []

    def glance(watch, active, state):
        taken.append(None)
        for one in active if len(taken) == step else ():
            for param in one.params if name in one.names else ():
                which = one.params[one.names.index(name)]
                if param is which:
                    (param if key == "weight" else state[param][key])[0, 0] = bad
        usual(watch, active, state)

    monkeypatch.setattr(hybrid, "glance", glance)


@pytest.mark.row("R20")
@pytest.mark.parametrize(
    ("recipe", "key", "bad", "step"),
    [
        ("muonh", "momentum", math.inf, 4),  # before a save
        ("spectral_sphere", "momentum", math.inf, 7),  # found with the gradients of step 8
        ("signsgd", "weight", math.nan, 4),
        ("adamw", "exp_avg_sq", math.inf, 12),  # the last update
        ("hybrid", "weight", math.nan, 12),
    ],
)
def test_a_bad_update_is_never_saved(tmp_path, monkeypatch, recipe, key, bad, step):
    spoil(monkeypatch, step, key, bad=bad)
    said = rf"^step {step}: the {key} of 'blocks.0.up.weight' is not finite after the update"
    with pytest.raises(FloatingPointError, match=said):
        run(tmp_path / "u", monkeypatch, Fault(), f"optim={recipe}", "checkpoint.every=4")
    saved = [path.name for path in checkpoint.committed(tmp_path / "u" / "checkpoints")]
    assert saved == [f"step-{s:07d}" for s in (4, 8) if s < step][-2:]
    assert not (tmp_path / "u" / "report.json").exists()


@pytest.mark.row("R20")
def test_a_bad_update_is_undone_by_a_rewind(tmp_path, monkeypatch):
    spoil(monkeypatch, 6, "weight")
    options = ["health.policy=rewind", "checkpoint.every=4"]
    fault = run(tmp_path / "r", monkeypatch, Fault(), *options)
    assert fault.trainer.health.skipped == [5]
    assert all(one.isfinite().all() for one in weights(tmp_path / "r").values())


@pytest.mark.row("R20")
def test_a_last_step_that_diverges_writes_no_report(tmp_path, monkeypatch):
    options = ["optim=adamw", "optim.lr=1e30", "schedule.steps=1", "schedule.shape=constant"]
    options += ["optim.hidden.weight_decay=0", "optim.head.weight_decay=0"]
    with pytest.raises(FloatingPointError, match="validation loss is nan: lower optim.lr"):
        run(tmp_path / "d", monkeypatch, Fault(), *options)
    assert not (tmp_path / "d" / "report.json").exists()
    assert "NaN" not in (tmp_path / "d" / "metrics.jsonl").read_text()


@pytest.mark.row("R20")
def test_a_weight_off_its_manifold_is_not_saved(tmp_path, monkeypatch):
    spoil(monkeypatch, 4, "weight", bad=50.0)
    with pytest.raises(FloatingPointError, match=r"step 4: .*'blocks.0.up.weight'"):
        run(tmp_path / "m", monkeypatch, Fault(), "optim=manifold_muon", "checkpoint.every=4")
    assert not checkpoint.committed(tmp_path / "m" / "checkpoints")


def test_a_rate_of_zero_trains_nothing_to_a_clean_end(tmp_path, monkeypatch):
    options = ["optim.lr=0", "optim.hidden.weight_decay=0", "optim=hybrid", "optim.rest.lr=0"]
    fault = Fault([0], bad=1.0)
    run(tmp_path / "z", monkeypatch, fault, *options)
    assert math.isfinite(json.loads((tmp_path / "z" / "report.json").read_text())["val_tokens"])
    start, end = fault.before[0], snap(fault.trainer.run.optimizer)
    names = [name for name, _ in fault.trainer.run.optimizer.named_parameters()]
    assert all(torch.equal(start[name], end[name]) for name in names)


@pytest.mark.row("R21")
def test_the_history_of_norms_survives_a_resume(tmp_path, monkeypatch):
    options = ["schedule.shape=constant", "checkpoint.every=8"]
    whole = run(tmp_path / "w", monkeypatch, Fault([], math.nan), *options)
    first = run(tmp_path / "h", monkeypatch, Fault(), *options, "schedule.steps=8")
    second = run(tmp_path / "h", monkeypatch, Fault(), *options)
    assert first.seen == list(range(8)) and second.seen == [8, 9, 10, 11]
    norms = [one.trainer.run.optimizer.watch.norms for one in (whole, second)]
    assert norms[0] == norms[1] and len(norms[0]) > 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["optim.nonfinite=skip"], "health.policy=skip"),
        (["optim.nonfinite=ignore"], "health.spike=20 with optim.nonfinite=ignore"),
        (["optim.nonfinite=ignore", "health.spike=0", "health.policy=skip"], "health.policy=skip"),
        (["health.policy=rewind", "checkpoint.every=0"], "checkpoint.every=0"),
        (["health.policy=rewind", "optim=sgd"], "rule=baseline"),
        (["health.spike=1"], "health.spike must be 0, or between 2 and 1e9, got 1"),
        (["optim.hidden.lr=2000", "optim=manifold_muon"], "an angle on Stiefel"),
    ],
)
def test_policies_that_cannot_be_followed_are_refused(tmp_path, monkeypatch, options, said):
    with pytest.raises(UsageError, match=said):
        run(tmp_path / "x", monkeypatch, Fault(), *options)
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return by_file(2, ROOT / "tests" / "reliability" / "numbers_job.py", folder)


@pytest.mark.dist
@pytest.mark.row("R21")
def test_ranks_cut_the_same_spike_as_one_process(ranks):
    for one in ranks:
        assert one["cut"] == [1, 1] and one["far"] < 1e-4
        assert all(a == pytest.approx(b, rel=1e-6) for a, b in one["norms"])


@pytest.mark.dist
@pytest.mark.row("R20")
@pytest.mark.parametrize("kind", ["loss", "gradient", "update"])
def test_what_one_rank_finds_every_rank_tells(ranks, kind):
    for rank, one in enumerate(ranks):
        told, text, kept = one[kind]
        assert told == kind and kept, one
        assert ("on another rank" in text) == (rank == 0), text
    assert kind != "gradient" or "of 'b' and 0 more" in ranks[1][kind][1]


def test_off_looks_at_nothing_more():
    params, optimizer = make()
    feed(params, 0)
    optimizer.step()
    assert optimizer.watch.pending is None and not optimizer.watch.norms
    assert set(params) == set(SHAPES)
