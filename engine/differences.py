"""What differs between a run and the checkpoint that it goes on from, and whether it may."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from geon.configs.changes import (
    FINGERPRINT,
    Change,
    Kind,
    changes,
    covers,
    flat,
    is_place,
    kind_of,
    leading,
    plain,
    refused,
)
from geon.configs.schema import Config, ScheduleConfig, Shape
from geon.engine import runfolder
from geon.engine.schedule import fraction, progress
from geon.errors import UsageError


def compare(
    config: Config, path: Path, facts: Mapping[str, Any], data: Mapping[str, Any], done: bool
) -> tuple[list[Change], list[str]]:
    """What has changed since a checkpoint, and lines on it.

    done: whether no step is left to train by other settings.

    Raises:
        UsageError: something that may not; names keys, both values, and how to allow it.
    """
    here = flat(plain(asdict(config)))
    there, said = _settings_of(path, facts)
    if "name" not in there:  # few facts: defaults say nothing of the others
        here = {key: value for key, value in here.items() if key in there}
    there[FINGERPRINT], here[FINGERPRINT] = _fingerprints(facts.get("data") or {}, data)
    found = changes(there, here)
    if there[FINGERPRINT] == here[FINGERPRINT] and "sha256" in there[FINGERPRINT]:
        found = [c._replace(kind=Kind.said) if is_place(c.key) else c for c in found]
    allowed = config.checkpoint.allow_change
    if wrong := refused(found, [] if done else allowed):
        raise UsageError(_refusal(path, wrong, done))
    for change in leading(found):
        if change.kind is not Kind.free:
            said.append(f"resume: {change}")
    said += [] if done else _jump(config, facts, found)
    said += [
        f"checkpoint.allow_change: nothing of '{entry}' has changed"
        for entry in allowed
        if not any(covers(entry, change.key) for change in found)
    ]
    return found, said


def _refusal(path: Path, wrong: list[Change], done: bool) -> str:
    told = "; ".join(change.where(f"'{path}'") for change in wrong[:3])
    more = f"; and {len(wrong) - 3} more" if wrong[3:] else ""
    if done:
        return (
            f"{told}{more}. That is of the run's last step, so nothing would be trained by it: set "
            "it alike; or start another run by another name or checkpoint.resume=never"
        )
    keys = [change.key for change in wrong]
    if wrong[3:]:
        keys = sorted({key.split(".")[0] for key in keys})
    return (
        f"{told}{more}. Set it alike; or start another run by another name or "
        f"checkpoint.resume=never; or go on regardless by "
        f"'checkpoint.allow_change=[{','.join(keys)}]'"
    )


def _settings_of(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings that a checkpoint was trained with, by dotted key, and lines on what is not known.

    Checkpoints of format 1 hold few: the run folder's config.yaml stands in, where there is one.
    """
    if facts.get("settings"):
        return flat(facts["settings"]), []
    file = path.absolute().parent.parent / runfolder.CONFIG
    if file.is_file():
        loaded: Any = OmegaConf.to_container(OmegaConf.load(file))
        return flat(loaded), [f"'{path}' holds no settings: compared with those of '{file}'"]
    known = {f"model.{key}": value for key, value in facts["model"].items()}
    known |= {"optim.name": facts["optim"], "seed": facts["seed"]}
    known = {key: value for key, value in known.items() if value is not None}
    return known, [
        f"'{path}' holds no settings: only model, optim.name, seed and data were compared"
    ]


def _fingerprints(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, str]:
    """What is known of both corpora, in words: their hash, or else the counts.

    And their tokenizers, where they differ: an id then stands for other text.
    """
    counts = ("train_tokens", "val_tokens", "train_bytes", "val_bytes")
    keys = ("sha256",) if "sha256" in there and "sha256" in here else counts
    both = [key for key in keys if key in there and key in here]
    names = [str(facts.get("tokenizer") or "") for facts in (there, here)]
    if all(names) and names[0][:12] != names[1][:12]:
        both.append("tokenizer")
    first, second = (" ".join(f"{k} {facts[k]}" for k in both) for facts in (there, here))
    return first, second


def _jump(config: Config, facts: Mapping[str, Any], changed: list[Change]) -> list[str]:
    """Say how far the rate jumps where the schedule has changed."""
    if not any(change.key.startswith("schedule.") for change in changed):
        return []
    values = asdict(config.schedule)
    known = {f.name for f in fields(ScheduleConfig)}
    for change in changed:
        group, _, key = change.key.partition(".")
        if group == "schedule" and key in known:
            values[key] = Shape(change.old) if key == "shape" else change.old
    rates = []
    for schedule in (ScheduleConfig(**values), config.schedule):
        rates.append(fraction(schedule, progress(schedule, facts["step"], facts["elapsed"])))
    return [
        f"resume: at step {facts['step']} the rate goes from {rates[0]:.4g} to {rates[1]:.4g} of "
        "its peak"
    ]


def changed_settings(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some changes, by key, that weights may depend on."""
    return {key: pair for key, pair in changed.items() if kind_of(key) is not Kind.free}
