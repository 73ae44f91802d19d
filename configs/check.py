"""Refuse a bad config before anything is started, naming the nearest valid key."""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geon.configs.schema import Config, OverrideConfig
from geon.errors import UsageError, nearest

ROOT = Path(__file__).resolve().parent
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,127}")


def groups(root: Path = ROOT) -> dict[str, list[str]]:
    """Config groups and their options, e.g. {"model": ["gpt", "gpt2"], "model/size": [...]}."""
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != ".":
            found.setdefault(group, []).append(file.stem)
    return found


def keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, inner nodes included."""
    found = []
    hints = get_type_hints(schema)
    for f in fields(schema):
        name, kind = f"{prefix}{f.name}", hints[f.name]
        found.append(name)
        if is_dataclass(kind):
            found += keys(kind, f"{name}.")
    return found


def check_overrides(arguments: Sequence[str]) -> None:
    """Check the keys of command-line overrides, `+` and `~` ones included.

    Hydra lets `+optim.lrr=3` through a schema, and names no alternative for a typo.

    Raises:
        UsageError: an unknown key or group option, with the nearest valid one.
    """
    parser, known_groups, known_keys = OverridesParser.create(), groups(), keys()
    for text in (a for a in arguments if "=" in a and not a.startswith("-")):
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"cannot read override '{text}': {reason}") from None
        key = override.key_or_group.split("@")[0]
        if key.startswith("hydra"):
            continue
        if key in known_groups:
            chosen = override.value()
            if isinstance(chosen, str) and chosen not in known_groups[key]:
                raise UsageError(
                    f"'{chosen}' is not an option of {key} "
                    f"({', '.join(known_groups[key])}).{nearest(chosen, known_groups[key])}"
                )
        elif not _known(key):
            every = known_keys + list(known_groups)
            raise UsageError(
                f"unknown config key '{key}' in '{text}'.{nearest(key, every)} "
                "List all keys with: python train.py --cfg job"
            )


def _known(key: str) -> bool:
    """Whether a dotted key exists in the schema; keys of dict fields are free."""
    kind: Any = Config
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        if not is_dataclass(kind):
            return False
        hints = get_type_hints(kind)
        if part not in hints:
            return False
        kind = hints[part]
    return True


def resolve(composed: DictConfig) -> Config:
    """Merge a composed config into the bare schema, resolve it, and check its values.

    Raises:
        UsageError: names the key.
    """
    try:
        bare = OmegaConf.structured(Config)
        merged = OmegaConf.merge(bare, composed)
        for name in merged.optim.overrides:
            typed = OmegaConf.structured(OverrideConfig)
            merged.optim.overrides[name] = OmegaConf.merge(typed, merged.optim.overrides[name])
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        lines = str(error).splitlines()
        key = getattr(error, "full_key", None)
        where = f" (key: {key})" if key and key not in lines[0] else ""
        hint = nearest(key, keys()) if key and not _known(key) else ""
        raise UsageError(f"config: {lines[0]}{where}.{hint}") from None
    assert isinstance(config, Config)
    _check_values(config)
    return config


def _check_values(config: Config) -> None:
    """Ranges that a type cannot say."""
    if not _RUN_NAME.fullmatch(config.name):
        raise UsageError(
            f"name '{config.name}': use letters, digits and ._=,+- (it names a folder)"
        )
    positive = {
        "schedule.steps": config.schedule.steps,
        "data.batch_tokens": config.data.batch_tokens,
        "logger.every": config.logger.every,
        "eval.batch": config.eval.batch,
        "checkpoint.keep": config.checkpoint.keep,
        "parallel.replicas": config.parallel.replicas,
        "parallel.timeout_seconds": config.parallel.timeout_seconds,
        "shard.max_buffer_mb": config.shard.max_buffer_mb,
        "eval.sample_temperature": config.eval.sample_temperature,
        "cluster.nodes": config.cluster.nodes,
        "cluster.ranks_per_node": config.cluster.ranks_per_node,
        "cluster.cpus_per_rank": config.cluster.cpus_per_rank,
        "sweep.parallel_jobs": config.sweep.parallel_jobs,
    }
    counts = {
        "data.micro_batch": config.data.micro_batch,
        "data.val_tokens": config.data.val_tokens,
        "data.bpe_vocab": config.data.bpe_vocab,
        "checkpoint.every": config.checkpoint.every,
        "eval.every": config.eval.every,
        "eval.sample_tokens": config.eval.sample_tokens,
        "logger.spectrum_every": config.logger.spectrum_every,
        "schedule.budget_seconds": config.schedule.budget_seconds,
        "optim.max_norm": config.optim.max_norm,
    }
    shares = {
        "schedule.warmup": config.schedule.warmup,
        "schedule.decay": config.schedule.decay,
        "schedule.floor": config.schedule.floor,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UsageError(f"{key} must be positive, got {value}")
    for key, value in counts.items():
        if not value >= 0:
            raise UsageError(f"{key} must not be negative, got {value}")
    for key, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise UsageError(f"{key} must be between 0 and 1, got {value}")
    if not 0.0 < config.data.val_percent < 100.0:
        raise UsageError(
            f"data.val_percent must be between 0 and 100, got {config.data.val_percent}"
        )
