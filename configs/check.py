"""Refuse a bad config before anything is started, naming the nearest valid key."""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geon.configs.ranges import check_values
from geon.configs.schema import Config, OptimConfig, OverrideConfig
from geon.errors import UsageError, nearest

ROOT = Path(__file__).resolve().parent


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
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = OverrideConfig if kind == OptimConfig.__annotations__["overrides"] else None
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
    # As plain containers: a merge of typed nodes would let keys added by `+` through.
    content = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(content, dict)
    config = OmegaConf.to_object(_merge(Config, content))
    assert isinstance(config, Config)
    typed = {
        name: OmegaConf.to_object(_merge(OverrideConfig, override, f"optim.overrides.{name}."))
        for name, override in config.optim.overrides.items()
    }
    config.optim.overrides = typed
    check_values(config)
    return config


def _merge(schema: type, content: Any, prefix: str = "") -> DictConfig:
    """Merge plain content into a schema and resolve it, naming the full key of what is wrong."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), content)
        OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{prefix}{error.full_key}" if error.full_key else prefix.rstrip(".")
        hint = "" if _known(key) else nearest(key, [prefix + k for k in keys(schema)])
        raise UsageError(f"config: {reason} (key: {key}).{hint}") from None
    assert isinstance(merged, DictConfig)
    return merged
