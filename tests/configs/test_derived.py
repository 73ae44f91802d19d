"""Values that follow others: heads, steps, rates of routes; experiments."""

import pytest

from geon.engine.build import make_model
from geon.errors import UsageError
from tests.configs.test_configs import build, composed, options, read, resolve


def test_heads_and_steps_follow_head_dim_and_tokens():
    config = read("model.d_model=96", "model.head_dim=16", "schedule.tokens=81920")
    assert config.model.n_head == 6
    assert config.schedule.steps == 81920 // config.data.batch_tokens
    assert make_model(config.model).shape.head_dim == 16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.head_dim=48", "model.d_model 128 does not divide into heads of model.head_dim 48"),
        ("schedule.tokens=5000", "schedule.tokens 5000 is not a multiple of data.batch_tokens"),
    ],
)
def test_what_does_not_divide_is_refused(setting, message):
    with pytest.raises(UsageError, match=message):
        read(setting)


def test_lr_scale_and_mup_make_the_rate_of_a_route():
    config = read("optim=adamw", "optim.lr=0.01", "optim.head.lr_scale=0.5", "model.mup=true")
    _, routing = build(config)
    assert routing.configs["head"].lr == pytest.approx(0.005)
    assert routing.configs["hidden"].lr == pytest.approx(0.01 * 64 / 128)
    assert routing.configs["embedding"].lr == pytest.approx(0.01)


def test_mup_refuses_a_route_whose_members_scale_differently():
    override = "+optim.overrides.all={pattern: '*', lr: 0.01, rule: adamw}"
    with pytest.raises(UsageError, match="optim.overrides.all holds hidden matrices and other"):
        build(resolve(composed("optim=adamw", "model.mup=true", override)))


def test_optional_routes_come_after_those_of_the_user():
    _, routing = build(resolve(composed("+optim.overrides.q={pattern: '*.q.weight', lr: 0.01}")))
    assert routing.assigned["blocks.0.attention.proj_in.q.weight"] == "q"
    assert routing.assigned["blocks.0.attention.proj_in.k.weight"] == "qk"
    _, routing = build(read("optim.overrides.qk=null"))
    assert "qk" not in routing.rules


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_builds(experiment):
    config = read(f"experiment={experiment}")
    assert config.name != "run"
    build(config)
