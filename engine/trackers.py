"""Weights & Biases and TensorBoard. Imports their packages when one is made."""

import atexit
import netrc
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from geon.configs.schema import LoggerConfig
from geon.engine.loggers import Logger, reason, warn
from geon.errors import UsageError
from geon.launch.env import agent_run, default, netrc_file

OPEN_SECONDS = 15.0
"""Until a run goes on without Weights & Biases, whatever it waits for."""
ANSWER_SECONDS = 3.0
"""Until a server that does not answer counts as gone."""
ONLINE_SECONDS = 7.0
"""For a server that answers to open the run; the rest is for opening it offline instead."""
FINISH_SECONDS = 30.0
"""Until the run ends, uploaded or not: what was not is on the disk."""
LEAVE_SECONDS = 3.0
"""For its process to end by itself."""

AXES = ("step", "tokens")
"""What curves are drawn over: the first, unless another is chosen."""

Found = TypeVar("Found")


def within(seconds: float, action: Callable[[], Found], what: str) -> Found:
    """Result of an action that runs in a thread and may not come back.

    Raises:
        TimeoutError: it did not in this time; the thread is left to itself.
    """
    done: list[Found] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(action())
        except BaseException as error:  # sys.exit too: it would end this thread without a word
            failed.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0] if isinstance(failed[0], Exception) else RuntimeError(reason(failed[0]))
    if not done:
        raise TimeoutError(f"{what} took more than {seconds:.0f} s")
    return done[0]


def answers(url: str) -> None:
    """Return if a server answers, whatever it says.

    Raises:
        Exception: why it does not.
    """
    try:
        urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return


def check_key(config: LoggerConfig) -> None:
    """Refuse to go online without a key (main rank), before a run folder exists.

    Raises:
        UsageError: names what to set.
    """
    if not config.wandb or config.wandb_mode != "online":
        return
    import wandb

    settings = wandb.setup().settings
    host, file = urlsplit(settings.base_url).netloc, netrc_file()
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return
    with suppress(OSError, netrc.NetrcParseError):
        if file.is_file() and netrc.netrc(file).authenticators(host):
            return
    raise UsageError(
        f"logger.wandb_mode=online needs an API key for {host}, and there is none: set "
        "WANDB_API_KEY, or type `wandb login` once; logger.wandb_mode=offline does without"
    )


class Wandb(Logger):
    """Weights & Biases. The API key comes from its own environment or netrc, never from here.

    Without an answer of its server the run is kept offline, in <run>/wandb.
    """

    def __init__(
        self, folder: Path, config: LoggerConfig, name: str, settings: Any, run_id: str
    ) -> None:
        self._folder = folder
        self._options: dict[str, Any] = {
            "project": config.wandb_project,
            "entity": config.wandb_entity or None,
            "group": config.wandb_group or None,
            "tags": list(config.wandb_tags),
            "name": name,
            "id": run_id,
            "dir": folder,
            "config": settings,
        }
        if agent_run():  # the sweep has said already which run of which project this is
            for key in ("project", "entity", "id"):
                del self._options[key]
        self._run: Any = within(
            OPEN_SECONDS, lambda: self._open(config.wandb_mode), "opening Weights & Biases"
        )
        self._first = int(self._run.starting_step or 0)
        for axis in AXES:
            self._run.define_metric(axis)
        self._kinds: set[Any] = set()
        # Weights & Biases waits for its uploads at exit, without end, unless we close it before.
        atexit.register(self._leave)

    def _open(self, mode: str) -> Any:
        # What it tells its makers of errors would hold up our exit where no network is.
        default("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        if mode != "online":
            return self._init(mode)
        url = ""
        try:
            url = wandb.setup().settings.base_url
            within(ANSWER_SECONDS, lambda: answers(url), url)
            return self._init(mode, resume="allow")
        except Exception as error:
            warn(
                f"Weights & Biases cannot be reached at '{url}' ({reason(error)}): this run is "
                f"kept offline; send it later with `wandb sync {self._folder}/wandb/offline-run-*`"
            )
            wandb.teardown()  # what it holds of the first attempt forbids a second
            return self._init("offline")

    def _init(self, mode: Any, **more: Any) -> Any:
        bounds = {"init_timeout": ONLINE_SECONDS, "finish_timeout": FINISH_SECONDS}
        known = self._wandb.Settings.model_fields  # an older version lacks the second
        chosen: dict[str, Any] = {name: bounds[name] for name in bounds if name in known}
        settings = self._wandb.Settings(**chosen)
        return self._wandb.init(mode=mode, settings=settings, **self._options, **more)

    def write(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record under its kind, at our own step.

        Steps that were logged before a resume are there already, and stay as they are.
        """
        if record["step"] < self._first:
            return
        numbers = {
            f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, int | float)
        }
        if record["kind"] not in self._kinds:
            self._kinds.add(record["kind"])
            self._run.define_metric(f"{record['kind']}/*", step_metric=AXES[0])
        axes = {name: record[name] for name in AXES if name in record}
        self._run.log({**numbers, **axes}, step=record["step"])

    def close(self) -> None:
        """Finish the run at Weights & Biases, within a bounded time."""
        if self._run is None:
            return
        run, self._run = self._run, None
        atexit.unregister(self._leave)
        try:
            within(FINISH_SECONDS + 5.0, run.finish, "finishing")
        finally:
            # Its process waits at exit for what it has not sent, or is dead: both are called off.
            with suppress(Exception):
                within(LEAVE_SECONDS, self._wandb.teardown, "leaving")

    def _leave(self) -> None:
        """Close at the end of a process whose training did not come to its end."""
        try:
            self.close()
        except Exception as error:
            warn(f"Weights & Biases could not be closed ({reason(error)})")


class Tensorboard(Logger):
    """Logger of TensorBoard event files in <run>/tensorboard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush_writers()
        # Tells TensorBoard to forget what an interrupted stretch logged after this step.
        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, record: dict[str, Any]) -> None:
        """Log the numbers of a record under its kind; those of the start are no curves."""
        if record["kind"] == "start":
            return
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


def _hush_writers() -> None:
    """Leave out the traceback of TensorBoard's thread: its error comes back in the next write."""
    before = threading.excepthook

    def hook(given: threading.ExceptHookArgs) -> None:
        if not type(given.thread).__module__.startswith("tensorboard."):
            before(given)

    threading.excepthook = hook
