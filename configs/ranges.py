"""Ranges of config values: what a type cannot say. One line a key, checked before anything runs."""

import math
import re
from collections.abc import Callable
from typing import Any

from geon.configs.recipes import RuleConfig
from geon.configs.schema import Config
from geon.errors import UsageError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,127}")

Test = tuple[str, Callable[[Any], bool]]
POSITIVE: Test = ("positive", lambda x: 0 < x < math.inf)
NOT_NEGATIVE: Test = ("0 or more", lambda x: 0 <= x < math.inf)
SHARE: Test = ("between 0 and 1", lambda x: 0 <= x <= 1)

RANGES: dict[str, Test] = {
    "model.base_width": POSITIVE,
    "model.head_dim": NOT_NEGATIVE,
    "model.rope_base": POSITIVE,
    "model.softcap": NOT_NEGATIVE,
    "optim.lr": NOT_NEGATIVE,
    "optim.max_norm": NOT_NEGATIVE,
    "optim.polar.steps": POSITIVE,
    "optim.polar.accuracy": NOT_NEGATIVE,
    "optim.polar.lower": ("between 0 and 1, ends excluded", lambda x: 0 < x < 1),
    "optim.record_pairs": ("steps of 1 or more", lambda x: all(step >= 1 for step in x)),
    "optim.solver.refine": NOT_NEGATIVE,
    "data.vocab_size": POSITIVE,
    "data.batch_tokens": POSITIVE,
    "data.micro_batch": NOT_NEGATIVE,
    "data.val_percent": ("between 0 and 100, ends excluded", lambda x: 0 < x < 100),
    "data.val_tokens": NOT_NEGATIVE,
    "data.bpe_vocab": NOT_NEGATIVE,
    "data.tokens": NOT_NEGATIVE,
    "parallel.replicas": POSITIVE,
    "parallel.tensor": POSITIVE,
    "parallel.zero": ("one of 0, 1, 2, 3", lambda x: 0 <= x <= 3),
    "parallel.loss_chunks": NOT_NEGATIVE,
    "parallel.timeout_seconds": POSITIVE,
    "schedule.steps": POSITIVE,
    "schedule.tokens": NOT_NEGATIVE,
    "schedule.warmup": SHARE,
    "schedule.decay": SHARE,
    "schedule.floor": SHARE,
    "schedule.budget_seconds": NOT_NEGATIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep": POSITIVE,
    "health.max_skips": POSITIVE,
    "health.max_rewinds": POSITIVE,
    "health.spike": ("0, or 2 or more", lambda x: x == 0 or 2 <= x < math.inf),
    "logger.every": POSITIVE,
    "logger.geometry_every": NOT_NEGATIVE,
    "logger.spectrum_every": NOT_NEGATIVE,
    "eval.every": NOT_NEGATIVE,
    "eval.batch": POSITIVE,
    "eval.sample_tokens": NOT_NEGATIVE,
    "eval.sample_temperature": NOT_NEGATIVE,
    "shard.max_buffer_mb": POSITIVE,
    "shard.tflops": NOT_NEGATIVE,
    "shard.half_tflops": NOT_NEGATIVE,
    "shard.gbytes": NOT_NEGATIVE,
    "shard.latency_us": NOT_NEGATIVE,
    "plan.world_size": NOT_NEGATIVE,
    "plan.memory_gb": NOT_NEGATIVE,
    "cluster.nodes": POSITIVE,
    "cluster.ranks_per_node": POSITIVE,
    "cluster.cpus_per_rank": POSITIVE,
    "sweep.parallel_jobs": NOT_NEGATIVE,
}

RULE_RANGES: dict[str, Test] = {
    "lr": NOT_NEGATIVE,
    "lr_scale": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "radius": POSITIVE,
    "momentum": ("at least 0 and below 1: it is the fraction kept", lambda x: 0 <= x < 1),
    "second_moment": ("at least 0 and below 1: it is the fraction kept", lambda x: 0 <= x < 1),
    "eps": NOT_NEGATIVE,
    "betas": (
        "two numbers of at least 0 and below 1",
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
    ),
}


def check_values(config: Config) -> None:
    """Check every range.

    Raises:
        UsageError: names the key, the value and the range.
    """
    if not _RUN_NAME.fullmatch(config.name):
        raise UsageError(
            f"name '{config.name}': use letters, digits and ._=,+- (it names a folder)"
        )
    for key, test in RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        _check(key, value, test)
    rules: dict[str, RuleConfig] = {
        f"optim.{role}": getattr(config.optim, role)
        for role in ("hidden", "embedding", "head", "tied", "rest")
    }
    rules |= {f"optim.overrides.{name}": rule for name, rule in config.optim.overrides.items()}
    for place, rule in rules.items():
        for name, test in RULE_RANGES.items():
            _check(f"{place}.{name}", getattr(rule, name), test)


def _check(key: str, value: Any, test: Test) -> None:
    words, holds = test
    if not holds(value):
        raise UsageError(f"{key} must be {words}, got {value}")
