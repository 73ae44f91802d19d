"""The page of `train.py --help`: groups with their options, keys with values and what they mean."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from geon.configs.overrides import groups, own_folders
from geon.configs.recipes import OverrideConfig, RuleConfig
from geon.configs.schema import ArmConfig, Config, MixConfig

_WIDTH = 100
_INTRO = """\
usage: python train.py [GROUP=OPTION ...] [KEY=VALUE ...] [flags]

  python train.py experiment=first_run                  a run, in runs/first_run
  python train.py optim=muon optim.lr=0.01 --help       this page, with that optimizer's values
  python train.py -m optim.lr=0.01,0.02 seed=0,1        a job for each; -m hydra/sweeper=optuna
  python train.py --config-dir DIR optim=mine           options of your own: DIR/optim/mine.yaml
  eval "$(python train.py -sc install=bash)"            tab completes groups, options and keys

flags: --cfg job (print the config), --info, -m, --config-dir DIR, -sc install=bash|zsh|fish

groups
"""


def page(config: Config, overrides: Sequence[str] = (), folder: Path | None = None) -> str:
    """The whole page.

    config: whose values are shown, e.g. the default one.
    overrides, folder: where the user's own options are looked for (`hydra.searchpath`,
    --config-dir).
    """
    options = groups()
    for place in own_folders(overrides, folder):
        for group, own in groups(place).items():
            options[group] = [*dict.fromkeys([*options.get(group, []), *own])]
    width = max(map(len, options)) + 2
    lines = [_INTRO.rstrip("\n")]
    for group, names in sorted(options.items()):
        lines += _block(f"  {group:<{width}}", " ".join(names))
    lines += ["", "keys, with the values that they have here"]
    for key, value, words in _rows(config):
        lines += [f"  {key}".rstrip()] if value is None else _block(f"  {key} = ", value)
        lines += _block(" " * 6, words) if words else []
    for name, kind in (("optim.overrides.NAME", OverrideConfig), ("data.mix.NAME", MixConfig),
                       ("sweep.arms.NAME", ArmConfig)):  # fmt: skip
        own = [f for f in documented(kind) if f not in documented(RuleConfig)]
        if kind is OverrideConfig:
            lines += ["", f"{name}: keys as optim.hidden, and"]
        else:
            lines += ["", name]
        for key in own:
            lines.append(f"  {key}")
            lines += _block(" " * 6, documented(kind)[key]) if documented(kind)[key] else []
    return "\n".join(lines)


def _rows(node: Any, prefix: str = "") -> Iterator[tuple[str, str | None, str]]:
    """Key, value (None of a group) and description, outer before inner."""
    kind, told = type(node), documented(type(node))
    hints = get_type_hints(kind)
    rules = [f.name for f in fields(kind) if hints[f.name] is RuleConfig]
    for field in fields(kind):
        key, value, words = f"{prefix}{field.name}", getattr(node, field.name), told[field.name]
        if field.name in rules[1:]:
            yield key, None, f"{words} Keys as {prefix}{rules[0]}.".strip()
        elif is_dataclass(value):
            yield "", None, ""
            yield key, None, words or _summary(type(value))
            yield from _rows(value, f"{key}.")
        else:
            if isinstance(value, Enum):
                choices = ", ".join(one.value for one in type(value))
                words = f"{words} One of {choices}.".strip()
                value = value.value
            yield key, _word(value), words


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value)


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


def _block(head: str, words: str) -> list[str]:
    """Words in lines, the first after `head`, the others below them."""
    return textwrap.wrap(
        words,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * min(len(head), 14),
        break_on_hyphens=False,
    )


@cache
def documented(kind: type) -> dict[str, str]:
    """Fields of a dataclass, with the docstring below each; '' where there is none."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for line, below in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                told = ""
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    told = " ".join(str(below.value.value).split())
                found[line.target.id] = told
    return found
