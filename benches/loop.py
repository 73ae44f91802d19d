"""A training run watched from outside: its phases, and a plain loop around its bare model."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from geon.configs.schema import Mode
from geon.engine.main import prepare
from geon.engine.trainer import Trainer
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import read_env

PHASES = ("data", "forward", "backward", "optimizer", "exchange")
UNREAD = ("checkpoint", "cluster", "eval", "logger", "mode", "name", "output", "plan", "schedule")
"""Keys of a config that a bench has no use for: it says itself how many steps it takes."""

Mark = tuple[str, "float | torch.cuda.Event"]


class Timeline:
    """Phases of steps, one after the other without gaps; a mark ends one and begins another.

    On a GPU marks are events in the stream: what the host does while the device is busy is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = False
        self.phase = PHASES[0]
        self._marks: list[list[Mark]] = []

    def mark(self, phase: str, first: bool = False) -> None:
        """Begin a phase; `first` begins a step, and ends the one before."""
        self.phase = phase
        if not self.on:
            return
        now = self._now()
        if first and self._marks:
            self._marks[-1].append((phase, now))
        if first:
            self._marks.append([])
        self._marks[-1].append((phase, now))

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase, and then what it interrupted."""
        outer = self.phase
        self.mark(phase)
        try:
            yield
        finally:
            self.mark(outer)

    def timed(self, call: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """A function that is a phase."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.within(phase):
                return call(*args, **kwargs)

        return wrapped

    def read(self) -> list[dict[str, float]]:
        """Seconds of each phase, by step. The last step is what the last `first` mark ended."""
        wait(self.device)
        steps, self._marks = self._marks[:-1], []
        return [_lengths(marks) for marks in steps]

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _lengths(marks: Sequence[Mark]) -> dict[str, float]:
    found = dict.fromkeys(PHASES, 0.0)
    for (phase, start), (_, stop) in zip(marks, marks[1:], strict=False):
        if isinstance(start, float) and isinstance(stop, float):
            found[phase] += stop - start
        else:
            found[phase] += start.elapsed_time(stop) / 1e3  # type: ignore[union-attr, arg-type]
    return found


class _Waited:
    """A collective under way whose wait is a phase."""

    def __init__(self, work: Any, timeline: Timeline) -> None:
        self.wait = timeline.timed(work.wait, "exchange")


@contextmanager
def _exchange_timed(timeline: Timeline) -> Iterator[None]:
    """Count what the optimizer does in torch.distributed as exchange."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if timeline.phase != "optimizer":
                return call(*args, **kwargs)
            with timeline.within("exchange"):
                work = call(*args, **kwargs)
            return work if work is None else _Waited(work, timeline)

        return wrapped

    if not dist.is_initialized():
        yield
        return
    names = ("all_reduce", "all_to_all_single")
    with patch.multiple(dist, **{name: counted(getattr(dist, name)) for name in names}):
        yield


class Watched:
    """A run's trainer whose phases are told to a timeline, and the tokens it reads."""

    def __init__(self, trainer: Trainer) -> None:
        parallel: Any = trainer.run.parallel
        self.trainer = trainer
        self.timeline = Timeline(parallel.device)
        self.micros: list[tuple[Tensor, ...]] = []
        self._loss = parallel.loss
        loss = self.timeline.timed(parallel.loss, "forward")

        def kept(*batch: Tensor) -> Tensor:
            self.micros.append(batch)
            return loss(*batch)

        parallel.loss = kept
        parallel.backward = self.timeline.timed(parallel.backward, "backward")
        parallel.update = self.timeline.timed(parallel.update, "optimizer")

    def step(self) -> None:
        """One step of the trainer."""
        self.micros.clear()
        self.timeline.mark("data", first=True)
        self.trainer.train_step()

    def phases(self, steps: int) -> list[dict[str, float]]:
        """Seconds of each phase of some steps."""
        self.timeline.on = True
        with _exchange_timed(self.timeline):
            for _ in range(steps):
                self.step()
        self.timeline.mark("data", first=True)
        self.timeline.on = False
        return self.timeline.read()

    def gradients(self) -> None:
        """Forward and backward, by the compiled model if any, on the tokens of the last step."""
        for batch in self.micros:
            (self._loss(*batch) / len(self.micros)).backward()

    def plain(self) -> None:
        """The last step's work in a plain loop."""
        self.gradients()
        self.trainer.run.optimizer.step()
        self.trainer.run.optimizer.zero_grad(set_to_none=True)

    def overhead(self, rounds: int) -> float:
        """Seconds of a step over those of the plain loop, minus one.

        The median of pairs, in turn; which of the two comes first alternates, as caches favour the
        second.
        """
        device, ratios = self.timeline.device, []
        for turn in range(rounds):
            if turn % 2:
                plain, step = seconds(self.plain, device), seconds(self.step, device)
            else:
                step, plain = seconds(self.step, device), seconds(self.plain, device)
            ratios.append(step / plain)
        return median(ratios) - 1.0


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Of one call, the device idle before and waited for."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def watched(overrides: Sequence[str]) -> Watched:
    """The trainer that train.py would make of the same overrides, at a constant rate.

    Raises:
        UsageError: an override without effect here, or as `prepare` does.
    """
    for override in overrides:
        key = re.split(r"[=./@]", override.lstrip("+~"))[0]
        if key in UNREAD or key == "sweep":
            raise UsageError(f"'{override}' has no effect on a bench: leave it out")
    config = compose(["schedule=constant", *overrides])
    config.mode, config.checkpoint.resume = Mode.train, "never"
    config.schedule.steps, config.schedule.budget_seconds = 1_000_000, 0.0
    trainer, _ = prepare(config, read_env(), [])
    return Watched(trainer)
