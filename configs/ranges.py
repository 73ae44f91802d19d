"""Ranges of config values: what a type cannot say. One line a key, checked before anything runs.

Every leaf of the schema has a line in RANGES or RULE_RANGES, or a type of few words (enums, truth).
Upper limits are far beyond use; they keep a slip of the hand from an hour of planning, or a model
that no memory holds.
"""

import re
from collections.abc import Callable
from typing import Any

from geon.configs.choices import RuleKind, Source
from geon.configs.recipes import RuleConfig
from geon.configs.schema import Config
from geon.errors import UsageError, shown

Test = tuple[tuple[str, Callable[[Any], bool]], ...]
"""What must hold, one after the other: words for it, and the test."""


def must(words: str, holds: Callable[[Any], bool]) -> Test:
    """One thing that must hold."""
    return ((words, holds),)


def at_most(high: float) -> Test:
    """A number's upper limit; nan is above every limit."""
    return must(f"at most {high:,}" if high < 1e18 else f"at most {high:g}", lambda x: x <= high)


def positive(high: float) -> Test:
    """Above 0, to `high`."""
    return must("positive", lambda x: x > 0) + at_most(high)


def not_negative(high: float) -> Test:
    """0 to `high`."""
    return must("0 or more", lambda x: x >= 0) + at_most(high)


def one_of(*words: str) -> Test:
    """One of a few words."""
    return must(f"one of {', '.join(words)}", lambda x: x in words)


def line(most: int, empty: bool = True) -> Test:
    """Printable text in one line."""
    words = f"one line of at most {most} printable characters{'' if empty else ', and not empty'}"
    return must(words, lambda x: len(x) <= most and (empty or bool(x.strip())) and _printable(x))


def _printable(text: str) -> bool:
    return all(c.isprintable() for c in text)


SHARE = must("between 0 and 1", lambda x: 0 <= x <= 1)
PART = must("between 0 and 1, and 1e-6 or more unless it is 0", lambda x: x == 0 or 1e-6 <= x <= 1)
FRACTION = must("at least 0 and below 1: it is the fraction kept", lambda x: 0 <= x < 1)
WORD = must(
    "a word of letters, digits and ._=,+- without spaces",
    lambda x: re.fullmatch(r"[A-Za-z0-9._=,+-]{0,128}", x) is not None,
)
RUN_NAME = must(
    "made of letters, digits and ._=,+-, 128 at most, and begin with a letter or digit: it names "
    "a folder",
    lambda x: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,127}", x) is not None,
)
PATH = line(1000)
STEPS = not_negative(10**9)
ANY = must("a mapping", lambda x: isinstance(x, dict))

RANGES: dict[str, Test] = {
    "name": RUN_NAME,
    "output": line(1000, empty=False),
    "seed": must("between -2^62 and 2^62", lambda x: abs(x) <= 2**62),
    "device": one_of("auto", "cpu", "cuda"),
    "data.vocab_size": not_negative(2**24),
    "model.n_layer": positive(1000),
    "model.n_head": positive(4096),
    "model.d_model": positive(2**17),
    "model.context": positive(2**24),
    "model.vocab_size": not_negative(2**24),
    "model.mlp_ratio": positive(64),
    "model.softcap": must("0, or between 0.1 and 1e6", lambda x: x == 0 or 0.1 <= x <= 1e6),
    "model.rope_base": must("above 1 and at most 1e12", lambda x: 1 < x <= 1e12),
    "model.activation_scale": positive(100),
    "model.base_width": positive(2**17),
    "model.head_dim": not_negative(2**17),
    "model.options": ANY,
    "model.init_from": line(4096),
    "optim.name": line(128, empty=False),
    "optim.lr": not_negative(1e30),
    "optim.lr_at.tokens": not_negative(10**18),
    "optim.lr_at.batch_tokens": not_negative(10**18),
    "optim.overrides": ANY,
    "optim.max_norm": not_negative(1e6),
    "optim.polar.coefficients": line(40, empty=False),
    "optim.polar.steps": positive(100),
    "optim.polar.dtype": line(40, empty=False),
    "optim.polar.accuracy": must(
        "0, or between 1e-7 and 0.5", lambda x: x == 0 or 1e-7 <= x <= 0.5
    ),
    "optim.polar.lower": must(
        "between 0 and 1, ends excluded, and 1e-6 or more",
        lambda x: 1e-6 <= x < 1,
    ),
    "optim.solver.method": line(40, empty=False),
    "optim.solver.refine": not_negative(100),
    "optim.solver.form": line(40, empty=False),
    "optim.solver.products": line(40, empty=False),
    "optim.record_pairs": must(
        "steps of 1 or more, each once",
        lambda x: all(1 <= step <= 10**9 for step in x) and len(set(x)) == len(x) <= 1000,
    ),
    "data.batch_tokens": positive(2**32),
    "data.micro_batch": not_negative(2**24),
    "data.val_percent": must("between 0 and 100, ends excluded", lambda x: 0 < x < 100),
    "data.val_tokens": not_negative(10**15),
    "data.path": PATH,
    "data.bpe_vocab": must("0, or between 256 and 2^20", lambda x: x == 0 or 256 <= x <= 2**20),
    "data.train": PATH,
    "data.val": PATH,
    "data.dir": PATH,
    "data.dtype": one_of("", "uint16", "uint32"),
    "data.tokens": not_negative(2 * 10**7),
    "data.tokenizer": PATH,
    "data.field": PATH,
    "data.dataset": PATH,
    "data.subset": line(256),
    "data.revision": line(256),
    "data.split": line(256, empty=False),
    "data.val_split": line(256),
    "data.streams": positive(2**20),
    "data.buffer": positive(10**7),
    "data.workers": not_negative(1024),
    "data.mix": ANY,
    "parallel.replicas": positive(2**20),
    "parallel.tensor": positive(2**20),
    "parallel.zero": must("one of 0, 1, 2, 3", lambda x: 0 <= x <= 3),
    "parallel.loss_chunks": not_negative(2**20),
    "parallel.timeout_seconds": must("1 or more", lambda x: x >= 1) + at_most(10**6),
    "schedule.steps": positive(10**9),
    "schedule.tokens": not_negative(10**17),
    "schedule.warmup": PART,
    "schedule.decay": PART,
    "schedule.floor": SHARE,
    "schedule.budget_seconds": must(
        "0, or between 0.1 and 1e8", lambda x: x == 0 or 0.1 <= x <= 1e8
    ),
    "checkpoint.every": STEPS,
    "checkpoint.keep": positive(10**6),
    "checkpoint.resume": line(1000, empty=False),
    "checkpoint.allow_change": must(
        "keys, groups or globs", lambda x: all(isinstance(one, str) and one for one in x)
    ),
    "health.max_skips": positive(10**6),
    "health.max_rewinds": positive(10**6),
    "health.spike": must("0, or between 2 and 1e9", lambda x: x == 0 or 2 <= x <= 1e9),
    "logger.every": positive(10**9),
    "logger.certify_every": STEPS,
    "logger.geometry_every": STEPS,
    "logger.spectrum_every": STEPS,
    "logger.wandb_project": line(128, empty=False),
    "logger.wandb_entity": WORD,
    "logger.wandb_group": line(128),
    "logger.wandb_tags": must(
        "words of 64 printable characters at most",
        lambda x: all(isinstance(one, str) and 0 < len(one) <= 64 and _printable(one) for one in x),
    ),
    "logger.wandb_mode": one_of("offline", "online", "disabled"),
    "eval.every": STEPS,
    "eval.batch": positive(2**24),
    "eval.sample_tokens": not_negative(10**6),
    "eval.sample_prompt": must("text of at most 10,000 characters", lambda x: len(x) <= 10_000),
    "eval.sample_temperature": must(
        "0, or between 0.001 and 1000", lambda x: x == 0 or 0.001 <= x <= 1000
    ),
    "shard.max_buffer_mb": positive(1e6),
    "shard.machine": line(1000, empty=False),
    "shard.tflops": not_negative(1e6),
    "shard.half_tflops": not_negative(1e6),
    "shard.gbytes": not_negative(1e9),
    "shard.latency_us": not_negative(1e9),
    "plan.world_size": not_negative(2**14),
    "plan.memory_gb": not_negative(1e6),
    "cluster.name": WORD,
    "cluster.nodes": positive(10**5),
    "cluster.ranks_per_node": positive(1024),
    "cluster.cpus_per_rank": positive(4096),
    "cluster.partition": line(128),
    "cluster.account": line(128),
    "cluster.qos": line(128),
    "cluster.constraint": line(1000),
    "cluster.mem": must(
        "a size, such as 200G", lambda x: re.fullmatch(r"(\d+[KMGT]?)?", x) is not None
    ),
    "cluster.gres": line(1000),
    "cluster.time": line(40),
    "cluster.directives": must(
        "options of sbatch without their hyphens, such as mail-type=END",
        lambda x: all(
            isinstance(one, str) and re.match(r"[a-z][a-z-]*(=|$)", one) and _printable(one)
            for one in x
        ),
    ),
    "cluster.setup": must("text of at most 10,000 characters", lambda x: len(x) <= 10_000),
    "sweep.name": RUN_NAME,
    "sweep.overrides": must("texts", lambda x: all(isinstance(one, str) for one in x)),
    "sweep.grid": ANY,
    "sweep.arms": ANY,
    "sweep.parallel_jobs": not_negative(1024),
}

RULE_RANGES: dict[str, Test] = {
    "lr": not_negative(1e30),
    "lr_scale": positive(1e6),
    "cooldown": PART,
    "weight_decay": not_negative(1000),
    "norm": line(40, empty=False),
    "manifold": line(40, empty=False),
    "manifold_options": ANY,
    "radius": positive(1e6),
    "momentum": FRACTION,
    "second_moment": FRACTION,
    "finishes": ANY,
    "spectral_scale": line(40, empty=False),
    "eps": not_negative(1),
    "betas": must(
        "two numbers of at least 0 and below 1",
        lambda x: len(x) == 2 and all(0 <= b < 1 for b in x),
    ),
    "baseline": line(40),
    "options": ANY,
    "pattern": line(1000, empty=False),
}


def check_values(config: Config) -> None:
    """Check every range, and the few that hold between keys.

    Raises:
        UsageError: names the key, the value and the range.
    """
    for key, test in RANGES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        _check(key, value, test)
    schedule = config.schedule
    for place, rule in rules(config).items():
        for name, test in RULE_RANGES.items():
            if hasattr(rule, name):
                _check(f"{place}.{name}", getattr(rule, name), test)
        if schedule.shape.value == "linear" and schedule.warmup + rule.cooldown > 1 + 1e-9:
            raise UsageError(
                f"schedule.warmup {schedule.warmup} and {place}.cooldown {rule.cooldown} overlap: "
                "together they are at most 1, the whole run"
            )
        shrinks = 0.0 if rule.rule is RuleKind.baseline else rule.weight_decay
        if rule.lr * rule.lr_scale * shrinks > 1:
            raise UsageError(
                f"{place}.weight_decay {shrinks} x {place}.lr {rule.lr:g} x {place}.lr_scale "
                f"{rule.lr_scale:g} is above 1: a step takes off the weight times that product; "
                f"lower one of them{' (optim.lr)' if rule.lr == config.optim.lr else ''}"
            )
    _check_mix(config)
    if schedule.shape.value == "linear" and schedule.warmup + schedule.decay > 1 + 1e-9:
        raise UsageError(
            f"schedule.warmup {schedule.warmup} and schedule.decay {schedule.decay} overlap: "
            "together they are at most 1, the whole run"
        )


def _check_mix(config: Config) -> None:
    for name, entry in config.data.mix.items():
        place = f"data.mix.{shown(name)}"
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise UsageError(f"{place}: name it by letters, digits, _ and -")
        if entry.source in (Source.stream, Source.mix, Source.images):
            raise UsageError(
                f"{place}.source={entry.source.value}: a mixture is of stdlib, text, bins and "
                "synthetic, whose length is known"
            )
        _check(f"{place}.weight", entry.weight, positive(1e6))
        for key, value in vars(entry).items():
            if value is not None and f"data.{key}" in RANGES:
                _check(f"{place}.{key}", value, RANGES[f"data.{key}"])


def rules(config: Config) -> dict[str, RuleConfig]:
    """The rules of a config by their places, roles before overrides."""
    roles = ("hidden", "embedding", "head", "tied", "rest")
    found = {f"optim.{role}": getattr(config.optim, role) for role in roles}
    for name, rule in config.optim.overrides.items():
        if name in roles or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise UsageError(
                f"optim.overrides.{shown(name)}: name it by letters, digits, _ and -, and unlike "
                f"the roles {', '.join(roles)}, whose rules it would replace"
            )
        found[f"optim.overrides.{name}"] = rule
    return found


def _holds(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return test(value)
    except TypeError:  # a reference to a value of another type: omegaconf checks no lists
        return False


def _check(key: str, value: Any, test: Test) -> None:
    for words, holds in test:
        if not _holds(holds, value):
            told = value if isinstance(value, int | float) else repr(value)
            raise UsageError(f"{key} must be {words}, got {shown(str(told))}")
