"""A multirun whose values another package chooses: `train.py -m hydra/sweeper=optuna ...`.

The package is a plugin of Hydra (hydra-optuna-sweeper, hydra-ax-sweeper, hydra-nevergrad-sweeper).
It proposes words, one trial after the other is trained in this process, and it is told the
objective of each.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geon.errors import UsageError, shown
from geon.launch.compose import searched, told_apart

_HYDRA = re.compile(r"[+~]*hydra[./]")
_AS_OURS = ("callbacks", "launcher", "job_logging", "hydra_logging")
"""Parts of Hydra's own config that make things by name, and that no config of a user's changes."""


class _Stop(BaseException):
    """Carries an error past Hydra and the sweeper, which would go on with the next trial."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words about the sweeper, and all others.

    Raises:
        UsageError: a setting of Hydra's that is not taken.
    """
    from geon.configs.overrides import SEARCH_PATH, check_overrides, check_sweeper, read

    own = [
        text
        for text in overrides
        if _HYDRA.match(text) and not text.startswith((f"{SEARCH_PATH}=", f"+{SEARCH_PATH}="))
    ]
    for text in own:
        override = read(text)
        if re.split(r"[./]", override.key_or_group)[:2] != ["hydra", "sweeper"]:
            check_overrides([text])
        check_sweeper(override)
    return own, [text for text in overrides if text not in own]


class Sweep:
    """What a multirun is asked for.

    Attributes:
        plugin: name of the sweeper; empty where the grid is ours.
        words: what is typed of the runs, with `hydra.sweeper.params` of the config files before it.
        fixed: those that are the same for every trial.

    Raises:
        UsageError: no such sweeper, or a config that makes something by name.
    """

    def __init__(self, overrides: Sequence[str], folder: Path | None = None) -> None:
        from geon.configs.overrides import own_folders, read

        self._own, self.words = split(overrides)
        self._search = searched(*own_folders(self.words, folder))
        self._folder = folder
        self.fixed = [text for text in self.words if not read(text).is_sweep_override()]
        node = self._hydra([*self._typed(self.fixed), *self._own, *self._search])
        chosen = node["runtime"]["choices"].items()
        choices = {k: v for k, v in chosen if k.startswith("hydra/sweeper") and v is not None}
        bare = self._hydra([f"{group}={name}" for group, name in choices.items()])
        for part in _AS_OURS:
            if node[part] != bare[part]:
                raise UsageError(
                    f"hydra.{part} is set by a config file: nothing is made by name from a config"
                )
        sweeper = node["sweeper"]
        if made := _targets(sweeper) - _targets(bare["sweeper"]):
            raise UsageError(
                f"hydra.sweeper makes '{shown(min(made))}', which is not the plugin's own choice: "
                "nothing is made by name from a config; choose hydra/sweeper/sampler=NAME"
            )
        name = choices["hydra/sweeper"]
        self.plugin = "" if name == "basic" else name
        typed = {read(text).key_or_group for text in self.words}
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        if not self.plugin:
            self.words = [*(one for one in params if read(one).key_or_group not in typed),
                          *self.words]  # fmt: skip

    def _typed(self, words: Sequence[str]) -> list[str]:
        from geon.configs import overrides as typed

        return [typed.as_text(typed.read(w)) for w in words if not _HYDRA.match(w)]

    def _hydra(self, words: list[str]) -> dict[str, Any]:
        """Hydra's own part of the config."""
        import hydra
        from omegaconf import OmegaConf

        from geon.configs import schema
        from geon.configs.overrides import ROOT
        from geon.launch.compose import reasons

        schema.register()
        try:
            with hydra.initialize_config_dir(str(ROOT), version_base="1.3"):
                found = hydra.compose("train", overrides=words, return_hydra_config=True)
        except Exception as error:
            hint = ""
            if any("hydra/sweeper" in word for word in self._own):
                hint = ". A sweeper is a package of its own, e.g. pip install hydra-optuna-sweeper"
            raise UsageError(f"config: {reasons(error)}{hint}") from None
        node: Any = OmegaConf.to_container(found.hydra, resolve=False)
        return node

    def first(self) -> list[str]:
        """Words of a trial that the sweeper might begin with.

        Raises:
            UsageError: a key or value that no trial could have.
        """
        from geon.configs.overrides import check_overrides, read

        found = []
        for text in self.words:
            if (one := read(text)).is_sweep_override():
                value: Any = one.value()
                if one.is_interval_sweep():
                    begin = value.start
                else:
                    begin = next(iter(one.sweep_string_iterator()))
                text = f"{one.key_or_group}={begin}"
            found.append(text)
        check_overrides(found, self._folder)
        return found

    def run(self, trial: Callable[[list[str], str], float]) -> None:
        """Let the plugin choose, and run its trials one after another.

        trial: words of a run and what tells it apart -> objective, less is better. A run whose
        numbers are not finite (FloatingPointError) has the objective infinity.

        Raises:
            Exception: what a trial ended with: no other is begun.
        """
        import hydra
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig

        from geon.configs.overrides import ROOT, read

        told: list[tuple[str, float]] = []
        same = {read(text).key_or_group for text in self.fixed}

        def act(_: object) -> float:
            words = [str(word) for word in HydraConfig.get().overrides.task]
            own = [word for word in words if read(word).key_or_group not in same | {""}]
            own = [word for word in own if not _HYDRA.match(word)]
            pairs = [word.lstrip("+").partition("=")[::2] for word in own]
            name = told_apart([key for key, _ in pairs], [_short(value) for _, value in pairs])
            name = f"{HydraConfig.get().job.num}-{name}"
            try:
                found = trial([*self.fixed, *own], name)
            except FloatingPointError as error:
                print(f"trial {name}: {error}; its objective is infinity", flush=True)
                found = math.inf
            except Exception as error:
                raise _Stop(error) from error
            told.append((" ".join(own), found))
            print(f"trial {name}: objective {found:.5f}", flush=True)
            return found

        with hydra.initialize_config_dir(str(ROOT), version_base="1.3"):
            inner = GlobalHydra.instance().hydra
        assert inner is not None
        plain = [w for w in self.words if not _HYDRA.match(w) and w not in self.fixed]
        try:
            inner.multirun(
                "train", act, [*self._typed(self.fixed), *plain, *self._own, *self._search]
            )
        except _Stop as stop:
            raise stop.error from None
        if told:
            words, best = min(told, key=lambda pair: pair[1])
            print(f"\nbest of {len(told)} trials: objective {best:.5f} with {words}", flush=True)


def _targets(node: Any) -> set[str]:
    """What a config would make by name."""
    if isinstance(node, dict):
        own = {str(node["_target_"])} if "_target_" in node else set()
        return own.union(*map(_targets, node.values()))
    return set().union(*map(_targets, node)) if isinstance(node, list) else set()


def _short(value: str) -> str:
    """A value as part of a name: four digits of a fraction are enough to tell trials apart."""
    try:
        return value if value.strip("-").isdigit() else f"{float(value):.4g}"
    except ValueError:
        return value
