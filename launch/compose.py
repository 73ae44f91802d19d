"""Composing configs outside `train.py`. Hydra is imported lazily: `--help` stays fast."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geon.errors import UsageError

if TYPE_CHECKING:
    from geon.configs.schema import Config


def compose(overrides: Sequence[str]) -> "Config":
    """Config that train.py composes from the same overrides.

    Raises:
        UsageError: an unknown key or option, or a value of the wrong type or range.
    """
    import hydra
    from hydra.errors import HydraException

    from geon.configs import check, schema

    schema.register()
    try:
        check.check_overrides(overrides)
        with hydra.initialize_config_dir(str(check.ROOT), version_base="1.3"):
            composed = hydra.compose("train", overrides=list(overrides))
    except HydraException as error:
        reasons = [str(e).splitlines()[0] for e in (error, error.__cause__) if e and e.args]
        raise UsageError(f"config: {': '.join(dict.fromkeys(reasons))}") from None
    return check.resolve(composed)
