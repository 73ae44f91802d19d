"""R28: the learning rate of any schedule rises, holds and falls as it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.configs.schema import ScheduleConfig, Shape
from geon.engine.schedule import fraction

pytestmark = pytest.mark.row("R28")

SCHEDULES = st.builds(
    ScheduleConfig,
    shape=st.sampled_from(list(Shape)),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.9),
    decay=st.floats(0, 1),
    floor=st.floats(0, 1),
)


def curve(config):
    """Fraction in each step, split where the warm-up ends."""
    at = [step / config.steps for step in range(config.steps)]
    all_of_it = [fraction(config, progress) for progress in at]
    warm = sum(progress < config.warmup for progress in at)
    return all_of_it[:warm], all_of_it[warm:]


@given(config=SCHEDULES)
@settings(max_examples=1000, deadline=None)
def test_it_rises_while_warming_up_and_falls_after(config):
    rise, fall = curve(config)
    assert all(0 < value <= 1 for value in rise)
    assert all(a < b for a, b in zip(rise, rise[1:], strict=False))
    assert all(a >= b for a, b in zip(fall, fall[1:], strict=False))
    assert all(config.floor - 1e-12 <= value <= 1 + 1e-12 for value in fall)


@given(config=SCHEDULES)
@settings(max_examples=1000, deadline=None)
def test_it_ends_at_the_floor_and_holds_the_peak_before(config):
    end = fraction(config, 1.0)
    falls = config.shape is Shape.cosine or (config.shape is Shape.linear and config.decay > 0)
    assert end == pytest.approx(config.floor if falls else 1.0, abs=1e-9)
    if config.shape is Shape.linear:
        for progress in (config.warmup, (config.warmup + 1 - config.decay) / 2):
            if config.warmup <= progress <= 1 - config.decay:
                assert fraction(config, progress) == pytest.approx(1.0)
    if config.shape is Shape.cosine:
        half = (1 + config.warmup) / 2
        assert fraction(config, half) == pytest.approx((1 + config.floor) / 2)


@given(config=SCHEDULES, progress=st.floats(-1, 3))
@settings(max_examples=1000, deadline=None)
def test_any_progress_has_a_rate(config, progress):
    assert 0 <= fraction(config, progress) <= 1 + 1e-12
