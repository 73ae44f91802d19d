"""What may be typed after `train.py`: keys, groups and values, before Hydra composes them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from geon.configs import recipes
from geon.configs.folder import search_path
from geon.configs.recipes import OverrideConfig
from geon.configs.schema import ArmConfig, Config, MixConfig
from geon.errors import UsageError, nearest, shown

ROOT = Path(__file__).resolve().parent
SEARCH_PATH = "hydra.searchpath"
LONGEST = 20_000
"""Characters of one override: a grid of a sweep is far below."""
_LISTED = ("experiment",)
"""Groups of which several options may be taken at once."""
_ENTRIES = {"optim.overrides": OverrideConfig, "sweep.arms": ArmConfig, "data.mix": MixConfig}
"""Schema of the entries of dict fields; entries of other dict fields are plain values."""
_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w.\[\]]*\}")
_PRIVATE = re.compile(r"_\w+_")
_UNDECODED = re.compile(r"[\ud800-\udfff\x00]")


def groups(root: Path = ROOT) -> dict[str, list[str]]:
    """Config groups and their options, e.g. {"model": ["gpt", "gpt2"], "model/size": [...]}.

    Folders in experiment/ are no groups: their files are its options, e.g. speedrun/offline.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        *folders, option = file.relative_to(root).with_suffix("").parts
        if folders[:1] == ["experiment"]:
            folders, option = folders[:1], "/".join([*folders[1:], option])
        if folders:
            found.setdefault("/".join(folders), []).append(option)
    return found


def keys() -> list[str]:
    """Every dotted key of a config, inner nodes included."""
    return recipes.keys(Config)


def kind_of(key: str) -> Any:
    """Type of a dotted key in the schema; Any inside free mappings, None where there is no key."""
    kind: Any = Config
    path: list[str] = []
    for part in key.split("."):
        if get_origin(kind) is dict:
            kind = _ENTRIES.get(".".join(path), Any)
        elif is_dataclass(kind) and part in (hints := get_type_hints(kind)):
            kind = hints[part]
        elif kind is not Any:
            return None
        path.append(part)
    return kind


def own_folders(arguments: Sequence[str], folder: Path | None = None) -> list[Path]:
    """Folders of the user's own config files: --config-dir, then those of hydra.searchpath.

    Raises:
        UsageError: an entry that is no folder.
    """
    found = [folder] if folder else []
    for text in arguments:
        if text.startswith(f"{SEARCH_PATH}="):
            value = read(text).value()
            check_plain(SEARCH_PATH, value)
            found += search_path(value)
    return found


def check_overrides(arguments: Sequence[str], folder: Path | None = None) -> list[Override]:
    """Read command-line overrides, and check their keys and what their values are made of.

    Hydra lets `+optim.lrr=3` through a schema, names no alternative for a typo, and resolves
    `${oc.env:X}` into what a run writes down.

    arguments: those that begin with a hyphen are left out.
    folder: of the user's own config files, whose options are known too, as are those of folders
    that hydra.searchpath names.

    Raises:
        UsageError: names what is wrong with the first bad one.
    """
    options = groups()
    for place in own_folders(arguments, folder):
        for group, own in groups(place).items():
            options[group] = [*dict.fromkeys([*options.get(group, []), *own])]
    return [_check(read(text), options) for text in arguments if not text.startswith("-")]


def read(text: str) -> Override:
    """Parse one override by Hydra's grammar.

    Raises:
        UsageError: says what to quote.
    """
    if _UNDECODED.search(text):
        raise UsageError(f"cannot read override '{shown(text)}': it is not UTF-8")
    if len(text) > LONGEST:
        raise UsageError(f"override '{shown(text)}' has {len(text)} characters, over {LONGEST}")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        key, _, value = text.partition("=")
        hint = "expected KEY=VALUE"
        if re.fullmatch(r"[+~]*[\w./@-]+", key) and value:
            hint = f"put a value with other signs than letters in quotes: '{key}=\"...\"'"
        raise UsageError(f"cannot read override '{shown(text)}': {shown(reason)}; {hint}") from None
    if override.package is not None:
        raise UsageError(
            f"'{shown(text)}': an option cannot be placed elsewhere (@): write GROUP=OPTION"
        )
    return override


def _check(override: Override, options: dict[str, list[str]]) -> Override:
    key, text = override.key_or_group, shown(override.input_line or "")
    if key == SEARCH_PATH and not (override.is_add() or override.is_delete()):
        return override  # own_folders has read it
    if re.split(r"[./]", key)[:2] == ["hydra", "sweeper"]:
        check_sweeper(override)
        raise UsageError(
            f"'{text}' has no effect without -m: it says what chooses the jobs' values"
        )
    if re.split(r"[./]", key)[0] == "hydra":
        raise UsageError(
            f"'{shown(key)}': Hydra's own settings are not to be changed here, nothing is made by "
            "name from a config; what is taken: hydra.searchpath=[file://FOLDER], and with -m "
            "hydra/sweeper=NAME and hydra.sweeper.KEY=VALUE"
        )
    if not key:
        raise UsageError(f"'{text}' has no key: write KEY=VALUE")
    if key not in options and kind_of(key) is None:
        raise UsageError(
            f"unknown config key '{shown(key)}'.{nearest(key, [*keys(), *options])} "
            "List all keys with: python train.py --cfg job"
        )
    if override.is_delete():
        if not any(key.startswith(f"{place}.") for place in _ENTRIES):
            raise UsageError(
                f"'{text}' would remove a key that every run has: set it to another value instead"
            )
        return override
    values = [override.value()]
    if override.is_sweep_override():
        values = [read(f"{key}={one}").value() for one in sweep_texts(override)]
    for value in values:
        if key in options:
            _check_choice(key, value, options[key], text)
        else:
            if is_dataclass(kind_of(key)) and isinstance(value, str) and "${" in value:
                raise UsageError(f"{key} holds keys of its own, and cannot be {shown(value)}")
            for place, leaf in flat(value, key):
                check_plain(place, leaf)
                _check_truth(place, leaf)
    return override


def check_sweeper(override: Override) -> None:
    """Check a word of `hydra/sweeper=NAME` and its kin: plain values only.

    Raises:
        UsageError: something would be made by name, or looked up.
    """
    key, text = override.key_or_group, shown(override.input_line or "")
    if override.is_delete() or override.is_sweep_override():
        raise UsageError(f"'{text}': one sweeper chooses the values of a multirun: give it one")
    check_plain(key, override.value())


def sweep_texts(override: Override, most: int = 1000) -> list[str]:
    """Values of a key that is given several, as each would be typed alone.

    Raises:
        UsageError: more than `most`, or none that can be listed.
    """
    text = shown(override.input_line or "")
    try:
        found = [str(one) for one in islice(override.sweep_string_iterator(), most + 1)]
    except (HydraException, NotImplementedError, AssertionError, TypeError, ValueError):
        found = []
    if not 0 < len(found) <= most:
        raise UsageError(
            f"'{text}': give 1 to {most} values for jobs, e.g. seed=0,1 or seed=range(3)"
        )
    return found


def _check_choice(group: str, value: Any, options: list[str], text: str) -> None:
    names = value if isinstance(value, list) and group in _LISTED else [value]
    if not names or value is None:
        raise UsageError(f"'{text}': choose one of {', '.join(options)}")
    for name in names:
        if not isinstance(name, str) or name not in options:
            raise UsageError(
                f"'{shown(str(name))}' is not an option of {group} "
                f"({', '.join(options)}).{nearest(str(name), options)}"
            )


def flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Leaves of a value by dotted key: entries of mappings where the schema has keys for them."""
    if isinstance(value, dict) and value and kind_of(key) is not Any:
        for name, inner in value.items():
            yield from flat(inner, f"{key}.{name}")
    else:
        yield key, value


def check_plain(key: str, value: Any) -> None:
    """Refuse what would be looked up or made when a value is read.

    Raises:
        UsageError: a resolver, such as ${oc.env:X}, or a key such as _target_.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            check_plain(f"{key}.{name}", inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_plain(key, inner)
    elif isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        raise UsageError(
            f"{shown(key)}: '{shown(value)}' would be looked up outside the config (environment, "
            "files, Hydra), and written down; only other keys may stand in ${...}: ${optim.lr}"
        )
    if any(_PRIVATE.fullmatch(part) for part in key.split(".")):
        raise UsageError(f"{shown(key)}: nothing is made by name from a config: leave it out")


def _check_truth(key: str, value: Any) -> None:
    """Refuse numbers for what is true or false: omegaconf takes 2, and half, for true."""
    if bool in {kind_of(key), *get_args(kind_of(key))} and (
        isinstance(value, int | float) and value not in (0, 1)
    ):
        raise UsageError(f"{key} must be true or false, got {value}")


def as_text(override: Override) -> str:
    """The override as Hydra is to read it.

    Numbers stay as they were typed where text is meant, and a mapping whose keys are the user's own
    may be given whole: Hydra would refuse its first new key without `+`.
    """
    text = override.input_line or ""
    if override.is_delete() or override.is_sweep_override():
        return text
    if kind_of(override.key_or_group) is str and isinstance(override.value(), bool | int | float):
        key, _, value = text.partition("=")
        return f'{key}="{value.strip()}"'
    if (
        get_origin(kind_of(override.key_or_group)) is dict
        and isinstance(override.value(), dict)
        and not text.startswith("+")
    ):
        return f"++{text}"
    return text
