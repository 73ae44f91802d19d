"""Where metrics go: metrics.jsonl always, Weights & Biases and TensorBoard when asked."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from geon.configs.schema import LoggerConfig
from geon.engine.runfolder import METRICS
from geon.errors import UsageError


class Logger(ABC):
    """Where metrics go: takes one flat record at a time, on the main rank."""

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Log a record; it has "kind" and "step"."""

    def close(self) -> None:  # noqa: B027 - nothing to close is the common case
        """Flush what was logged, and release the logger."""


class Jsonl(Logger):
    """Logger of metrics.jsonl: one JSON object a line, flushed as written."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / METRICS).open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as a line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close metrics.jsonl."""
        self._file.close()


class Wandb(Logger):
    """Weights & Biases. The API key comes from its own environment or netrc, never from here."""

    def __init__(self, folder: Path, config: LoggerConfig, name: str, settings: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("logger=wandb needs the package: pip install -e '.[wandb]'") from None
        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=name,
            resume="allow",
            dir=folder,
            mode=config.wandb_mode,  # type: ignore[arg-type]
            config=settings,
        )

    def write(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record under its kind, against our own step."""
        numbers = {
            f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, int | float)
        }
        self._run.log({**numbers, "step": record["step"]})

    def close(self) -> None:
        """Finish the run at Weights & Biases."""
        self._run.finish()


class Tensorboard(Logger):
    """Logger of TensorBoard event files in <run>/tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "logger=tensorboard needs the package: pip install -e '.[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record under its kind."""
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def check_loggers(config: LoggerConfig) -> None:
    """Refuse loggers that cannot be opened, before a run folder exists.

    Raises:
        UsageError: names the package to install, or the mode to choose.
    """
    modes = ("offline", "online", "disabled")
    if config.wandb_mode not in modes:
        raise UsageError(
            f"logger.wandb_mode '{config.wandb_mode}' is not one of {', '.join(modes)}"
        )
    from importlib.util import find_spec

    for wanted, package in ((config.wandb, "wandb"), (config.tensorboard, "tensorboard")):
        if wanted and find_spec(package) is None:
            raise UsageError(f"logger={package} needs the package: pip install -e '.[{package}]'")


def open_loggers(folder: Path, config: LoggerConfig, name: str, settings: Any) -> list[Logger]:
    """Loggers that the config asks for."""
    loggers: list[Logger] = [Jsonl(folder)]
    if config.wandb:
        loggers.append(Wandb(folder, config, name, settings))
    if config.tensorboard:
        loggers.append(Tensorboard(folder))
    return loggers
