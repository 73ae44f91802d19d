"""Option files over tiny sizes, and what may be typed beside them: every key, legal values."""

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args

from omegaconf import OmegaConf

from geon.configs.check import ROOT, resolve, settle
from geon.configs.choices import TransportChoice
from geon.configs.ranges import RANGES, RULE_RANGES, _holds
from geon.configs.rate import carry_rate
from geon.configs.recipes import OverrideConfig, fill_entries
from geon.configs.schema import Config, MixConfig
from geon.optim.baselines import BASELINES
from geon.optim.finishes import FINISHES
from geon.optim.linalg import Precision
from geon.optim.manifolds import MANIFOLDS
from geon.optim.norms import NORMS
from geon.optim.norms.spectral import SCALES
from geon.optim.polar.coefficients import TABLES
from geon.optim.shard import MACHINES
from geon.optim.solvers.stiefel_spectral import FORMS, METHODS

TINY = {
    "model": {"n_layer": 1, "n_head": 4, "d_model": 16, "context": 16},
    "data": {"batch_tokens": 256, "val_tokens": 64},
    "schedule": {"steps": 8},
}
CHOSEN = {
    "model": "gpt", "optim": "muon", "data": "synthetic", "parallel": "fsdp",
    "schedule": "linear", "checkpoint": "default", "logger": "jsonl", "cluster": "local",
}  # fmt: skip
IMAGE = {"model": "mlp", "data": "images"}
NODES = {f.name for f in fields(Config) if is_dataclass(f.type)}
ROLES = ("hidden", "embedding", "head", "tied", "rest")
WORDS: dict[str, Any] = {
    "device": ("cpu", "cuda"),
    "optim.polar.coefficients": TABLES,
    "optim.polar.dtype": list(Precision),
    "optim.solver.method": METHODS,
    "optim.solver.form": FORMS,
    "optim.solver.products": list(Precision),
    "norm": NORMS,
    "manifold": MANIFOLDS,
    "spectral_scale": SCALES,
    "baseline": BASELINES,
    "betas": ([0.5, 0.6],),
    "options": ({"weight_decay": 0.5}, {"eps": 0.5}),
    "manifold_options": ({"axis": "columns"},),
    "finishes": [*({name: {}} for name in FINISHES), {"update_floor": {"least": 1.0}}],
    "optim.overrides": ({"q": {"pattern": "*", "lr": 0.5, "rule": "adamw"}},),
    "optim.record_pairs": ([1],),
    "data.dtype": ("uint16",),
    "model.options": ({"n_kv_head": 1}, {"n_expert": 2}),
    "cluster.mem": ("64G",),
    "data.mix": ({"a": {"weight": 1.0, "source": "synthetic", "tokens": 5000}},),
    "checkpoint.resume": ("never",),
    "checkpoint.allow_change": (["optim.lr"],),
    "logger.wandb_mode": ("online", "disabled"),
    "shard.machine": MACHINES,
    "shard.transport": (TransportChoice.gram,),  # owner is what auto may come to
    "sweep.overrides": (["seed=1"],),
    "sweep.grid": ({"seed": [1]},),
    "sweep.arms": ({"a": {"overrides": ["seed=1"]}},),
}
"""Words of keys whose vocabulary is a table of the code, and examples of free mappings."""


@cache
def file(group: str, option: str) -> Any:
    content: Any = OmegaConf.to_container(OmegaConf.load(ROOT / group / f"{option}.yaml"))
    return {key: value for key, value in content.items() if key != "defaults"}


def composed(**chosen: str) -> dict[str, Any]:
    """Plain content of the chosen option files over tiny sizes, references unresolved."""
    image = chosen.get("model") in ("mlp", "vit", "conv") or chosen.get("data") == "images"
    words = CHOSEN | (IMAGE if image else {}) | chosen
    content: dict[str, Any] = {"task": "image" if image else "text", "device": "cpu"}
    for group, option in words.items():
        content[group] = copy.deepcopy(file(group, option)) | TINY.get(group, {})
    if image:
        content["model"] |= {"n_layer": 2, "context": 1}
        content["data"] |= {"tokens": 104, "batch_tokens": 8}
    return content


def leaves(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of the schema that hold values, with their types."""
    for f in fields(schema):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f.type


def at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def range_of(key: str) -> Any:
    """Range of a key; () where its type has few words."""
    place, _, word = key.rpartition(".")
    rule = place.startswith("optim.") and place.split(".")[1] in (*ROLES, "overrides")
    return RULE_RANGES.get(word, ()) if rule else RANGES.get(key, ())


def others(key: str, kind: Any, now: Any) -> Iterator[Any]:
    """Legal values of a key other than `now`: all words, a few numbers."""
    word = key.rpartition(".")[2]
    listed = WORDS.get(key, WORDS.get(word) if key.startswith("optim.") else None)
    if listed is not None:
        found: Any = listed
    elif kind is bool or bool in get_args(kind):
        found = (True, False)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        found = kind
    elif kind in (int, float):
        found = [kind(x) for x in (2 * now, now / 2, 1, 2, 4, 8, 0, 0.5, 0.25, 1e-3, 64, 512)]
    else:
        found = ("x",)
    for value in found:
        if value != now and all(_holds(test, value) for _, test in range_of(key)):
            yield value


def changed(config: Config, raw: dict[str, Any], key: str, value: Any) -> Config:
    """The config that typing KEY=VALUE gives.

    Raises:
        UsageError: as composing does.
    """
    *path, word = key.split(".")
    if f"${{{key}}}" in repr(raw):  # others follow it
        raw = copy.deepcopy(raw)
        node = raw
        for part in path:
            node = node.setdefault(part, {})
        node[word] = value
        return read(raw)
    if key.startswith("optim.lr_at."):
        raw = copy.deepcopy(raw)
        raw["optim"].setdefault("lr_at", {})[word] = value
        return read(raw)
    config = copy.deepcopy(config)
    setattr(at(config, ".".join(path)) if path else config, word, copy.deepcopy(value))
    if key == "optim.overrides" or key == "data.mix":
        place = config.optim if key == "optim.overrides" else config.data
        kind = OverrideConfig if key == "optim.overrides" else MixConfig
        setattr(place, word, fill_entries(kind, value, key))
    return settle(config)


def read(raw: dict[str, Any]) -> Config:
    """The config of plain content, as `compose` reads it."""
    carry_rate(found := fill_rates(raw))
    return resolve(found)


def fill_rates(raw: dict[str, Any]) -> Any:
    """With the numbers that `carry_rate` asks for."""
    content = copy.deepcopy(raw)
    content["optim"]["lr_at"] = {"tokens": 0, "batch_tokens": 0} | content["optim"].get("lr_at", {})
    content["schedule"].setdefault("tokens", 0)
    return OmegaConf.create(content)
