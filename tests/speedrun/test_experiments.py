"""Every config of experiment=speedrun plans, and trains at a tenth of the width."""

from contextlib import closing
from pathlib import Path

import pytest

from geon.configs.overrides import ROOT
from geon.engine.build import make_model, make_routing
from geon.engine.main import execute, prepare
from geon.engine.planning import plan_ahead
from geon.engine.schedule import fraction, own_fractions, progress
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env

FOLDER = Path(ROOT) / "experiment" / "speedrun"
TRACKS = sorted(
    file.stem
    for file in FOLDER.glob("*.yaml")
    if file.stem.startswith(("track3_", "record")) or file.stem.endswith("_124m")
)
SHORT = ("track3_muonh", "scion_124m", "record6_adam")
SMALL = [
    "data=synthetic",
    "data.tokens=60000",
    "data.vocab_size=256",
    "data.val_tokens=0",
    "data.batch_tokens=1024",
    "model.context=64",
    "model.d_model=72",
    "model.n_layer=2",
    "schedule.steps=20",
    "parallel=single",
    "checkpoint=none",
    "device=cpu",
]


def test_all_eleven_are_there_and_plan_at_full_size():
    assert len(TRACKS) == 11
    for name in TRACKS:
        config = compose([f"experiment=speedrun/{name}"])
        model = make_model(config.model)
        routing = make_routing(model, config.optim)
        assert plan_ahead(config, model, routing, 8) is not None
        tied = model.arch == "gpt"
        assert model.parameter_count() == (123_568_128 if tied else 162_354_816)
        assert (config.data.batch_tokens, config.data.val_tokens) == (524_288, 10_485_760)
        assert not config.data.shuffle and config.eval.every == 125


def test_a_plan_needs_no_shards_where_the_config_counts_the_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["experiment=speedrun/track3_hybrid", "mode=plan", "plan.world_size=8"]
    execute(compose(command), Env())
    said = capsys.readouterr()
    assert "gpt_track3: 162,354,816 parameters" in said.out
    assert "'fineweb10B' (data.dir) does not exist yet" in said.err
    with pytest.raises(UsageError, match="data.batch_tokens 524289 is not a multiple"):
        execute(compose([*command, "data.batch_tokens=524289"]), Env())
    with pytest.raises(UsageError, match="data.dir 'fineweb10B' does not exist"):
        execute(compose([*command, "data.vocab_size=0"]), Env())


@pytest.mark.parametrize(
    "name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in TRACKS]
)
def test_twenty_steps_at_a_tenth_of_the_width_lower_the_loss(tmp_path, name):
    config = compose([f"experiment=speedrun/{name}", *SMALL, f"output='{tmp_path}'"])
    trainer, _ = prepare(config, Env(), [])
    losses = []
    with closing(trainer.loader):
        for _ in range(20):
            trainer.train_step()
            losses.append(trainer.loss.item())
    assert losses[-1] < losses[0] - 0.05, losses


def test_rates_of_muonh_have_two_cooldowns():
    """Result #37: matrices from the first step on, the others over the last 85%."""
    config = compose(["experiment=speedrun/track3_muonh"])
    rules = make_routing(make_model(config.model), config.optim).configs
    for step, matrices, others in ((0, 1.0, 1.0), (400, 2850 / 3250, 1.0), (1625, 0.5, 0.5 / 0.85)):
        own = own_fractions(config.schedule, rules, progress(config.schedule, step, 0.0))
        for name in ("hidden", "out", "up", "down"):
            assert own[name] == pytest.approx(matrices)
        assert own["embedding"] == own["rest"] == pytest.approx(others)


@pytest.mark.parametrize(("name", "steps"), [("track3_adamw", 5625), ("record6_adam", 5100)])
def test_warm_ups_are_of_250_steps(name, steps):
    schedule = compose([f"experiment=speedrun/{name}"]).schedule
    assert schedule.steps == steps
    for step in (0, 1, 100, 248, 249, 250):
        share = fraction(schedule, progress(schedule, step, 0.0))
        assert share == pytest.approx(min(1.0, (step + 1) / 250), rel=1e-5)
    last = 1450 if name == "record6_adam" else 0.7 * 5625
    assert fraction(schedule, (steps - 1) / steps) == pytest.approx(1 / last, rel=1e-4)
