"""Refuse a bad config before anything is started, naming the key and what was expected."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geon.configs.choices import Source
from geon.configs.overrides import ROOT as ROOT
from geon.configs.overrides import check_overrides as check_overrides
from geon.configs.overrides import check_plain
from geon.configs.overrides import groups as groups
from geon.configs.overrides import keys as keys
from geon.configs.ranges import check_values
from geon.configs.recipes import fill, fill_entries, with_overrides
from geon.configs.schema import ArmConfig, Config, MixConfig, ModelConfig
from geon.errors import UsageError, shown


def resolve(composed: DictConfig) -> Config:
    """Merge a composed config into the bare schema, resolve it, and check its values.

    Raises:
        UsageError: names the key.
    """
    # As plain containers: a merge of typed nodes would let keys added by `+` through.
    try:
        content: Any = OmegaConf.to_container(composed, resolve=False)
    except OmegaConfBaseException as error:
        raise UsageError(f"config: {shown(str(error).splitlines()[0])}") from None
    for key, value in content.items():
        check_plain(str(key), value)
    config = fill(Config, content)
    with_overrides(config.optim)
    config.data.mix = fill_entries(MixConfig, config.data.mix, "data.mix")
    config.sweep.arms = fill_entries(ArmConfig, config.sweep.arms, "sweep.arms")
    return settle(config)


def settle(config: Config) -> Config:
    """Check the values of a filled config, and work out what follows from others. In place.

    Raises:
        UsageError: names the key.
    """
    config.output = _expanded(config.output)
    check_values(config)
    _check_ids(config)
    _count_heads(config.model)
    _count_steps(config)
    return config


def _expanded(output: str) -> str:
    """The output folder with ~ at its begin replaced, as a shell does outside of quotes."""
    if not output.startswith("~"):
        return output
    try:
        return str(Path(output).expanduser())
    except RuntimeError:
        raise UsageError(f"output '{shown(output)}': there is no such user's home") from None


def _count_steps(config: Config) -> None:
    """Let the number of steps follow the number of tokens where that is given."""
    if tokens := config.schedule.tokens:
        if tokens % config.data.batch_tokens:
            raise UsageError(
                f"schedule.tokens {tokens} is not a multiple of data.batch_tokens "
                f"{config.data.batch_tokens}"
            )
        config.schedule.steps = tokens // config.data.batch_tokens


def _check_ids(config: Config) -> None:
    """Refuse a vocabulary of 0 where no tokenizer says it."""
    if not config.data.vocab_size and config.data.source is Source.synthetic:
        raise UsageError("data.vocab_size 0: data=synthetic has no tokenizer to take it from")
    if not config.model.vocab_size and config.data.vocab_size:
        raise UsageError(
            f"model.vocab_size 0, and data.vocab_size is {config.data.vocab_size}: leave it out, "
            "and it follows the data"
        )


def _count_heads(model: ModelConfig) -> None:
    """Let n_head follow head_dim where that is given."""
    if model.head_dim:
        if model.d_model % model.head_dim:
            raise UsageError(
                f"model.d_model {model.d_model} does not divide into heads of model.head_dim "
                f"{model.head_dim}"
            )
        model.n_head = model.d_model // model.head_dim
