"""Learning-rate fraction as a function of progress in [0, 1]."""

import math
from collections.abc import Mapping
from dataclasses import replace

from geon.configs.recipes import RuleConfig
from geon.configs.schema import ScheduleConfig, Shape


def progress(config: ScheduleConfig, step: int, elapsed: float) -> float:
    """Share of a run that lies behind; by the clock when the budget is tighter.

    elapsed: seconds of training.
    """
    done = step / config.steps
    if config.budget_seconds:
        done = max(done, elapsed / config.budget_seconds)
    return done


def fraction(config: ScheduleConfig, progress: float) -> float:
    """Fraction of the peak learning rate at this share of the run.

    progress: share of the run that lies behind, 0 at the first step, below 1 at the last.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        # The first step of a warm-up must not be of size zero: count the step under way.
        return (progress + 1.0 / config.steps) / (config.warmup + 1.0 / config.steps)
    if config.shape is Shape.constant:
        return 1.0
    if config.shape is Shape.linear:
        left = (1.0 - progress) / config.decay if config.decay > 0 else 1.0
        return config.floor + (1.0 - config.floor) * min(1.0, left)
    through = (progress - config.warmup) / max(1.0 - config.warmup, 1e-12)
    return config.floor + (1.0 - config.floor) * 0.5 * (1.0 + math.cos(math.pi * through))


def own_fractions(
    config: ScheduleConfig, rules: Mapping[str, RuleConfig], progress: float
) -> dict[str, float]:
    """Fractions of the routes whose rates decay over a share of the run of their own."""
    return {
        name: fraction(replace(config, decay=rule.cooldown), progress)
        for name, rule in rules.items()
        if rule.cooldown and config.shape is Shape.linear
    }
