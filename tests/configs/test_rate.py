"""A rate carried from the run at which it was searched to another."""

import pytest

from geon.configs.rate import carried_rate
from geon.errors import UsageError
from geon.launch.compose import compose

AT = ["optim.lr_at.tokens=1000000", "optim.lr_at.batch_tokens=1000"]


def test_rates_that_follow_optim_lr_are_those_of_the_runs_size():
    config = compose(
        ["optim.lr=0.04", "data.batch_tokens=8000", "schedule.steps=2000", *AT], "train"
    )
    wanted = 0.04 * 16**-0.45 * 8**0.63
    rates = config.optim.lr, config.optim.hidden.lr, config.optim.head.lr
    assert rates == pytest.approx((wanted,) * 3)
    assert config.optim.rest.lr == 0.003


def test_tokens_given_in_place_of_steps_count_too():
    words = ["optim.lr=0.04", "data.batch_tokens=1000", "schedule.tokens=4000000", *AT]
    assert compose(words, "train").optim.lr == pytest.approx(0.04 * 4**-0.45)


def test_a_run_of_the_same_size_keeps_its_rate():
    words = ["optim.lr=0.04", "data.batch_tokens=1000", "schedule.steps=1000", *AT]
    assert compose(words, "train").optim.lr == pytest.approx(0.04)


@pytest.mark.parametrize("given", AT)
def test_half_of_a_size_is_refused(given):
    with pytest.raises(UsageError, match=r"optim\.lr_at\.tokens=.*both"):
        compose([given], "train")


def test_numbers_that_are_no_sizes_are_refused():
    with pytest.raises(UsageError, match="above 0"):
        carried_rate(0.04, (0, 1000), (1000, 1000))


def test_a_recipe_that_does_not_step_by_norms_has_no_rate_to_carry():
    with pytest.raises(UsageError, match=r"optim\.lr_at\..*steepest rule"):
        compose(["optim=adamw", *AT], "train")
