"""The training loop: read, forward, backward, step. All else is a callback."""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from geon.data import Loader
from geon.engine.build import Run
from geon.engine.loggers import Logger
from geon.engine.metrics import PeakMemory, Stopwatch
from geon.engine.schedule import fraction

COLLECT_EVERY = 1000
"""Steps between collections of garbage, besides those after evaluations and checkpoints."""


@contextmanager
def collected_seldom() -> Iterator[None]:
    """Without the collector's own calls: it would stop one rank at a time, for all to wait."""
    was = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was:
            gc.enable()


class Callback:
    """Hooks into a run; every rank calls every hook, so that hooks may communicate."""

    def on_start(self, trainer: "Trainer") -> None:
        """Called before the first step, after a resume."""

    def before_update(self, trainer: "Trainer") -> None:
        """Called with gradients there, weights not yet moved; `trainer.step` steps lie behind."""

    def on_step(self, trainer: "Trainer") -> None:
        """Called after each step; `trainer.step` steps lie behind."""

    def on_end(self, trainer: "Trainer") -> None:
        """Called after the last step."""


class Trainer:
    """Takes a built run to its last step.

    Attributes:
        step: steps taken, over resumes; with it goes the whole data state.
        elapsed: seconds of training, over resumes.
        lr_fraction: share of the peak rates in the last step.
        loss: mean loss of the last step over this rank's tokens, on the device.
    """

    def __init__(self, run: Run, folder: Path, callbacks: Sequence[Callback]) -> None:
        self.run = run
        self.folder = folder
        self.callbacks = callbacks
        self.loggers: list[Logger] = []
        self.step = 0
        self.elapsed = 0.0
        self.lr_fraction = 0.0
        self.loss = torch.zeros((), device=run.parallel.device)
        self.loader = Loader(run.batches, run.parallel.device)
        self.stopwatch = Stopwatch(run.parallel.device)
        self.memory = PeakMemory(run.parallel.device)
        self._resumed_at = time.perf_counter()

    @property
    def progress(self) -> float:
        """Share of the run that lies behind; by the clock when the budget is tighter."""
        schedule = self.run.config.schedule
        done = self.step / schedule.steps
        if schedule.budget_seconds:
            done = max(done, self.elapsed / schedule.budget_seconds)
        return done

    @property
    def tokens(self) -> int:
        """Number of tokens trained on."""
        return self.step * self.run.config.data.batch_tokens

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """Send a record to the loggers (main rank only)."""
        for logger in self.loggers:
            logger.write({"kind": kind, "step": self.step, **record})

    def fit(self) -> None:
        """Train to the end of the schedule, then let the callbacks finish."""
        with closing(self.loader), collected_seldom():
            for callback in self._entered():
                callback.on_start(self)
            self._resumed_at = time.perf_counter() - self.elapsed
            while self.progress < 1.0:
                self.train_step()
                for callback in self._entered():
                    callback.on_step(self)
                if self.step % COLLECT_EVERY == 0:
                    gc.collect()
            for callback in self._entered():
                callback.on_end(self)
        for logger in self.loggers:
            logger.close()

    def _entered(self) -> Iterator[Callback]:
        """Callbacks in turn; while one is called, it is the phase that this rank is in."""
        for callback in self.callbacks:
            self.run.parallel.enter(type(callback).__name__.lower())
            yield callback

    def train_step(self) -> None:
        """One optimizer step over the global batch of `self.step`."""
        run, parallel = self.run, self.run.parallel
        self.lr_fraction = fraction(run.config.schedule, self.progress)
        run.optimizer.set_lr(self.lr_fraction)
        self.stopwatch.mark(first=True)
        micros = self.loader.step(self.step)
        total = torch.zeros((), device=parallel.device)
        for i, (tokens, targets) in enumerate(micros):
            last = i == len(micros) - 1
            with parallel.gradients(last):
                loss = parallel.loss(tokens, targets)
                parallel.backward(loss, len(micros), last)
            total += loss.detach() / len(micros)
        self.loss = total
        self.stopwatch.mark()
        for callback in self.callbacks:
            callback.before_update(self)
        try:
            parallel.update(run.optimizer)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {self.step + 1}: {error}; the last checkpoint under {self.folder} is from "
                "before"
            ) from None
        self.stopwatch.mark()
        self.step += 1
        self._read_clock()

    def _read_clock(self) -> None:
        self.elapsed = time.perf_counter() - self._resumed_at
        if self.run.config.schedule.budget_seconds:
            # Ranks must agree on when to stop and on the learning rate.
            self.elapsed = self.run.parallel.from_main(self.elapsed)

    def check_finite(self, loss: float) -> None:
        """Stop a diverged run.

        Raises:
            FloatingPointError: on every rank, naming the step.
        """
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}: lower optim.lr; the last checkpoint "
                f"under {self.folder} is from before"
            )
