"""Composing configs from what was typed. Hydra is imported lazily: `--help` stays fast."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geon.errors import UsageError, shown

if TYPE_CHECKING:
    from geon.configs.schema import Config

MOST_JOBS = 1000
"""Jobs of a multirun: a slip in a range makes millions."""


def compose(overrides: Sequence[str], program: str = "", folder: Path | None = None) -> "Config":
    """Config that train.py composes from the same overrides.

    program: train, sweep or slurm: also refuse what this one does not read. Empty does not.
    folder: of the user's own config files.

    Raises:
        UsageError: an unknown key or option, a value of the wrong type or range, or one without
            effect.
    """
    import hydra
    from omegaconf import OmegaConf

    from geon.configs import check, effects, schema
    from geon.configs import overrides as typed
    from geon.configs.folder import check_folder
    from geon.configs.rate import carry_rate

    schema.register()
    folders = typed.own_folders(overrides, folder)
    for place in folders:
        check_folder(place)
    told = check.check_overrides(overrides, folder)
    told = [one for one in told if one.key_or_group != typed.SEARCH_PATH]
    if several := [one for one in told if one.is_sweep_override()]:
        raise UsageError(
            f"'{shown(several[0].input_line or '')}' gives several values: start one job for each "
            "with -m, or put the value in quotes where it is one text"
        )
    words = [typed.as_text(one) for one in told]
    search = searched(*folders)

    def composed(words: list[str]) -> Any:
        try:
            with hydra.initialize_config_dir(str(check.ROOT), version_base="1.3"):
                return hydra.compose("train", overrides=[*words, *search])
        except Exception as error:  # of Hydra, omegaconf, yaml: whatever reading them meets
            raise UsageError(f"config: {reasons(error)}") from None

    found = composed(words)
    try:
        carry_rate(found)
        config = check.resolve(found)
    except UsageError as error:
        refers = [word for word in words if "${" in word]
        if refers and "nterpolation" in str(error):  # it may fail at another key, which follows
            raise UsageError(f"{error} Typed: {shown(', '.join(refers))}") from None
        raise
    if program:
        raw = OmegaConf.to_container(found, resolve=False)
        options = set(typed.groups()).union(*map(typed.groups, folders))
        chosen = [w for w, one in zip(words, told, strict=True) if one.key_or_group in options]
        effects.check_effects(config, told, raw, lambda: composed(chosen), program)
    return config


def searched(*folders: Path) -> list[str]:
    """The override by which Hydra, or another start of ours, finds the user's own config files."""
    places = [f"file://{folder.resolve()}" for folder in folders]
    return [f"hydra.searchpath={json.dumps(places, ensure_ascii=False)}"] if folders else []


def with_folder(overrides: Sequence[str], folder: Path | None) -> list[str]:
    """Overrides that say themselves where the user's own config files are (--config-dir)."""
    return [*overrides, *(searched(folder) if folder else [])]


def reasons(error: BaseException) -> str:
    """What Hydra and the error behind its own say, in one line."""
    told = [str(e).strip() for e in (error, error.__cause__) if e is not None]
    lines = []
    for text in filter(None, told):
        first, *rest = [line.strip() for line in text.splitlines()]
        lines.append(first.rstrip(".:"))
        if first.endswith(":"):  # names a file; the next line says what is wrong in it
            lines += rest[:1]
        lines += [line for line in rest if line.startswith("full_key: ")]
    return shown(": ".join(dict.fromkeys(lines or [type(error).__name__])), 400)


def as_read(text: str) -> str:
    """An override, which `compose` has taken, as Hydra is to read it."""
    from geon.configs import overrides as typed

    return typed.as_text(typed.read(text))


def jobs(overrides: Sequence[str], folder: Path | None = None) -> list[tuple[str, list[str]]]:
    """Jobs of a multirun: what tells each apart, and its overrides.

    Raises:
        UsageError: no key has several values, or there are too many jobs.
    """
    from geon.configs.overrides import check_overrides, sweep_texts

    told = check_overrides(overrides, folder)
    swept = {one.key_or_group: sweep_texts(one) for one in told if one.is_sweep_override()}
    if not swept:
        raise UsageError("-m starts several jobs: give a key several values, e.g. seed=0,1")
    for key, values in swept.items():
        if twice := [one for one in values if values.count(one) > 1]:
            raise UsageError(f"-m: {key}={shown(twice[0])} is given twice: one job would do")
    if math.prod(map(len, swept.values())) > MOST_JOBS:
        raise UsageError(f"-m: the values of {', '.join(swept)} make more than {MOST_JOBS} jobs")
    fixed = [one.input_line or "" for one in told if one.key_or_group not in swept]
    points = list(itertools.product(*swept.values()))
    names = [told_apart(list(swept), point) for point in points]
    if len(set(names)) < len(names):  # values that differ in signs that no folder may have
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    return [
        (name, [*fixed, *map("=".join, zip(swept, point, strict=True))])
        for name, point in zip(names, points, strict=True)
    ]


def told_apart(keys: Sequence[str], point: Sequence[str], most: int = 80) -> str:
    """What tells a job apart: its swept keys, by their last part where that is unique.

    most: characters, of which the last seven are a hash where there would be more.
    """
    last = [re.split(r"[./]", key)[-1] for key in keys]
    shorts = [s if last.count(s) == 1 else key for s, key in zip(last, keys, strict=True)]
    pairs = (f"{short}={value}" for short, value in zip(shorts, point, strict=True))
    told = ",".join(pairs)
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "-", told)
    if len(name) > most:
        name = f"{name[: most - 7]}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
    return name
