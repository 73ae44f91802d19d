"""What may change where a run goes on from a checkpoint: one table, for resumes and for sweeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from geon.configs.schema import Config
from geon.errors import UsageError, nearest


class Kind(Enum):
    """What a changed key does to a resume."""

    free = "free"
    """Nothing that a trained weight depends on, but for rounding."""
    said = "said"
    """The run goes on, and says so."""
    refused = "refused"
    """Refused, unless checkpoint.allow_change names it: then it is said."""


TABLE: dict[str, Kind] = {
    # What is looked at, kept and printed, and where it runs.
    "name": Kind.free,
    "output": Kind.free,
    "mode": Kind.free,
    "device": Kind.free,
    "logger.*": Kind.free,
    "eval.*": Kind.free,
    "checkpoint.*": Kind.free,
    "plan.*": Kind.free,
    "cluster.*": Kind.free,
    "sweep.*": Kind.free,
    "shard.*": Kind.free,
    "data.micro_batch": Kind.free,
    "data.val_tokens": Kind.free,
    "data.workers": Kind.free,
    "optim.record_pairs": Kind.free,
    "optim.compile": Kind.free,
    # Weights and state are fp32 in every checkpoint, so any precision goes on from any other; but
    # each rounds the gradients otherwise, so the curve may bend here.
    "parallel.precision": Kind.said,
    "parallel.*": Kind.free,
    "schedule.*": Kind.said,
    "health.*": Kind.said,
    "optim.nonfinite": Kind.said,
    # What the weights are a function of.
    "seed": Kind.refused,
    "task": Kind.refused,
    "model.*": Kind.refused,
    "data.*": Kind.refused,
    "optim.*": Kind.refused,
}
"""Globs over dotted keys; the first that fits decides."""

MEASURED = ("data.val_tokens",)
"""Keys that a run may change and go on, but on which its result depends."""

PLACES = (
    "data.path",
    "data.train",
    "data.val",
    "data.dir",
    "data.dataset",
    "data.revision",
    "data.tokenizer",
)
"""Where data lie. Elsewhere, data of the same fingerprint are the same data: that is said."""

FINGERPRINT = "data.sha256"
"""Not a key of a config: the hash of the tokens' source, which commit files hold."""


class Change(NamedTuple):
    """A value that is another one than it was."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key} {_word(self.old)} -> {_word(self.new)}"

    def where(self, there: str) -> str:
        """Say both values. there: what holds the old one."""
        return f"{self.key} is {_word(self.old)} in {there} and {_word(self.new)} here"


def _word(value: Any) -> str:
    return "not set" if value is None else f"{value}"


def kind_of(key: str) -> Kind | None:
    """Kind of a key; None if the table does not know it, which is taken for refused."""
    return next((kind for glob, kind in TABLE.items() if fnmatchcase(key, glob)), None)


def is_place(key: str) -> bool:
    """Whether a key says where data lie, those of a source of a mixture included."""
    mixed, _, word = key.rpartition(".")
    return key in PLACES or (mixed.startswith("data.mix.") and f"data.{word}" in PLACES)


def plain(value: Any) -> Any:
    """Replace the enums in nested dicts and lists by their values."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by dotted key. An empty dict has none."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    inner = (flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in node.items())
    return {key: value for found in inner for key, value in found.items()}


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """What differs between two settings, each by dotted key; free keys included.

    A key that `there` lacks had the schema's default, if it has one; one that the schema does not
    know any more is left out.
    """
    defaults = flat(plain(asdict(Config())))
    found = []
    for key in sorted({*there, *here}, key=_outer_first):
        if key not in here and key not in defaults and not _is_free_form(key):
            continue
        old = there.get(key, defaults.get(key))
        new = here.get(key)
        if old != new and not (key not in there and old == "???"):
            found.append(Change(key, old, new, kind_of(key) or Kind.refused))
    return found


def _outer_first(key: str) -> tuple[int, bool, str]:
    """Order in which changes are told: what stands for many keys before the many."""
    chosen = key in ("model.arch", "optim.name", "data.source")
    return key.count("."), not chosen, key


def leading(found: Sequence[Change]) -> list[Change]:
    """Without rates of roles that were optim.lr and still are: they follow it."""
    lr = next((change for change in found if change.key == "optim.lr"), None)
    return [
        change
        for change in found
        if change is lr
        or lr is None
        or not (fnmatchcase(change.key, "optim.*.lr") and change[1:3] == lr[1:3])
    ]


def _is_free_form(key: str) -> bool:
    """Whether a key lies in a dict whose keys are the user's own."""
    words = ("overrides", "options", "manifold_options", "finishes", "mix")
    return key == FINGERPRINT or any(f".{word}." in key for word in words)


def covers(entry: str, key: str) -> bool:
    """Whether an entry of checkpoint.allow_change (a key, a group or a glob) means a key."""
    return entry == key or key.startswith(f"{entry}.") or fnmatchcase(key, entry)


def check_allowed(allowed: Sequence[str], known: Iterable[str]) -> None:
    """Refuse entries of checkpoint.allow_change that mean no key at all.

    known: dotted keys of a config. Of entries in dicts of the user's own, any may be meant.

    Raises:
        UsageError: names the entry and the nearest key.
    """
    every = sorted({*known, FINGERPRINT})
    groups = {key.rsplit(".", i)[0] for key in every for i in range(1, key.count(".") + 1)}
    for entry in allowed:
        if not _is_free_form(f"{entry}.") and not any(covers(entry, key) for key in every):
            hint = nearest(entry, [*every, *groups])
            raise UsageError(f"checkpoint.allow_change: '{entry}' is no key of a config.{hint}")


def refused(found: Sequence[Change], allowed: Sequence[str]) -> list[Change]:
    """Changes that may not be made: those of kind refused that no entry allows."""
    return [
        change
        for change in leading(found)
        if change.kind is Kind.refused and not any(covers(entry, change.key) for entry in allowed)
    ]
