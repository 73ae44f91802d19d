"""Refuse a bad config before anything is started, naming the nearest valid key."""

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from geon.configs import recipes
from geon.configs.ranges import check_values
from geon.configs.recipes import OverrideConfig, fill, with_overrides
from geon.configs.schema import ArmConfig, Config, ModelConfig
from geon.errors import UsageError, nearest

ROOT = Path(__file__).resolve().parent
_ENTRIES = {"optim.overrides": OverrideConfig, "sweep.arms": ArmConfig}
"""Schema of the entries of dict fields; entries of other dict fields are plain values."""
T = TypeVar("T")


def groups(root: Path = ROOT) -> dict[str, list[str]]:
    """Config groups and their options, e.g. {"model": ["gpt", "gpt2"], "model/size": [...]}."""
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != ".":
            found.setdefault(group, []).append(file.stem)
    return found


def keys() -> list[str]:
    """Every dotted key of a config, inner nodes included."""
    return recipes.keys(Config)


def check_overrides(arguments: Sequence[str]) -> None:
    """Check the keys of command-line overrides, `+` and `~` ones included.

    Hydra lets `+optim.lrr=3` through a schema, and names no alternative for a typo.

    Raises:
        UsageError: an unknown key or group option, with the nearest valid one.
    """
    parser, known_groups, known_keys = OverridesParser.create(), groups(), keys()
    for text in (a for a in arguments if a.startswith("~") or ("=" in a and a[0] != "-")):
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"cannot read override '{text}': {reason}") from None
        key = override.key_or_group.split("@")[0]
        if re.split(r"[./]", key)[0] == "hydra":
            continue
        if key in known_groups:
            chosen = override.value()
            if override.is_delete() or override.is_sweep_override():
                continue
            if chosen is None:
                raise UsageError(f"'{text}': choose one of {', '.join(known_groups[key])}")
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
    """Whether a dotted key exists in the schema; names in dict fields are free."""
    kind: Any = Config
    path: list[str] = []
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = _ENTRIES.get(".".join(path))
        elif is_dataclass(kind) and part in (hints := get_type_hints(kind)):
            kind = hints[part]
        else:
            return False
        path.append(part)
    return True


def resolve(composed: DictConfig) -> Config:
    """Merge a composed config into the bare schema, resolve it, and check its values.

    Raises:
        UsageError: names the key.
    """
    # As plain containers: a merge of typed nodes would let keys added by `+` through.
    config = fill(Config, OmegaConf.to_container(composed, resolve=False))
    with_overrides(config.optim)
    config.sweep.arms = {
        name: fill(ArmConfig, arm, prefix=f"sweep.arms.{name}.")
        for name, arm in config.sweep.arms.items()
        if arm is not None
    }
    check_values(config)
    _count_heads(config.model)
    _count_steps(config)
    return config


def _count_steps(config: Config) -> None:
    """Let the number of steps follow the number of tokens where that is given."""
    if tokens := config.schedule.tokens:
        if tokens % config.data.batch_tokens:
            raise UsageError(
                f"schedule.tokens {tokens} is not a multiple of data.batch_tokens "
                f"{config.data.batch_tokens}"
            )
        config.schedule.steps = tokens // config.data.batch_tokens


def _count_heads(model: ModelConfig) -> None:
    """Let n_head follow head_dim where that is given."""
    if model.head_dim:
        if model.d_model % model.head_dim:
            raise UsageError(
                f"model.d_model {model.d_model} does not divide into heads of model.head_dim "
                f"{model.head_dim}"
            )
        model.n_head = model.d_model // model.head_dim
