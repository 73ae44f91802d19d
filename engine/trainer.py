"""The training loop: read, forward, backward, step. All else is a callback."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geon.data import Batches, Loader, StreamBatches
from geon.engine.build import Run
from geon.engine.health import Health
from geon.engine.loggers import Logger
from geon.engine.metrics import PeakMemory, Stopwatch
from geon.engine.schedule import fraction, own_fractions, progress
from geon.errors import UsageError

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

    def on_rewind(self, trainer: "Trainer") -> None:
        """Called when the run went back to a checkpoint: `trainer.step` is that of it."""

    def on_end(self, trainer: "Trainer") -> None:
        """Called after the last step."""


class Trainer:
    """Takes a built run to its last step.

    Attributes:
        step: steps taken, over resumes; with it goes the whole data state.
        elapsed: seconds of training, over resumes; evaluations are not counted.
        tokens: those read, over resumes.
        words: overrides that the run was started with.
        facts: what else the commit file of each checkpoint says of the run, for JSON.
        lr_fraction: share of the peak rates in the last step.
        loss: mean loss of the last step over this rank's tokens, on the device; None where the
            step was left out.
        health: what is done about bad numbers.
    """

    def __init__(self, run: Run, folder: Path, callbacks: Sequence[Callback]) -> None:
        self.run = run
        self.folder = folder
        self.callbacks = callbacks
        self.loggers: list[Logger] = []
        self.step = 0
        self.elapsed = 0.0
        self.tokens = 0
        self.words: list[str] = []
        self.facts: dict[str, Any] = {}
        self.lr_fraction = 0.0
        self.loss: Tensor | None = None
        self.health = Health(run.config.health)
        self.loader = Loader(run.batches, run.parallel.device)
        self.stopwatch = Stopwatch(run.parallel.device)
        self.memory = PeakMemory(run.parallel.device)
        self._resumed_at = time.perf_counter()

    @property
    def progress(self) -> float:
        """Share of the run that lies behind; by the clock when the budget is tighter."""
        return progress(self.run.config.schedule, self.step, self.elapsed)

    def read_from(self, batches: Batches) -> None:
        """Read other batches from here on, unless they are the same; a stream's never are."""
        same = batches.first(self.step) == self.run.batches.first(self.step)
        if isinstance(batches, StreamBatches) or not same:
            self.run.batches = batches
            self.loader.close()
            self.loader = Loader(batches, self.run.parallel.device)

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """Send a record to the loggers (main rank only)."""
        for logger in self.loggers:
            logger.write({"kind": kind, "step": self.step, **record})

    def fit(self) -> None:
        """Train to the end of the schedule, then let the callbacks finish."""
        with ExitStack() as last, collected_seldom():
            last.callback(lambda: self.loader.close())  # the one that is there then
            for callback in self._entered():
                callback.on_start(self)
            self._resumed_at = time.perf_counter() - self.elapsed
            while self.progress < 1.0:
                try:
                    self.train_step()
                    for callback in self._entered():
                        callback.on_step(self)
                except FloatingPointError as error:
                    self.health.recover(self, error)
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
        """One optimizer step over the global batch of `self.step`, or none where it is left out.

        Raises:
            FloatingPointError: a bad number that does not just leave the step out.
        """
        run = self.run
        self.lr_fraction = fraction(run.config.schedule, self.progress)
        run.optimizer.set_lr(self.lr_fraction)
        own = own_fractions(run.config.schedule, run.routing.configs, self.progress)
        for group in run.optimizer.param_groups:
            if group["name"] in own:
                group["lr"] = own[group["name"]] * group["initial_lr"]
        self.loss = None
        if self.step in self.health.banned:
            self.health.leave_out(self, "the run went back from here")
        else:
            try:
                self.loss = self._take_step()
                self.health.went_well()
            except FloatingPointError as error:
                self.stopwatch.drop()
                self.health.refused(self, error)
                run.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += run.config.data.batch_tokens
        self._read_clock()
        saving, evaluating = run.config.checkpoint.every, run.config.eval.every
        ends = self.progress >= 1.0
        if ends or any(every and self.step % every == 0 for every in (saving, evaluating)):
            run.optimizer.settle()  # the weights are used otherwise than by a step that looks
        if ends or (saving and self.step % saving == 0):
            self._check_manifolds()

    def _take_step(self) -> Tensor:
        """Read, forward, backward, step; the mean loss over this rank's tokens."""
        run, parallel = self.run, self.run.parallel
        self.stopwatch.mark(first=True)
        micros = self.loader.step(self.step)
        total = torch.zeros((), device=parallel.device)
        for i, (tokens, targets) in enumerate(micros):
            last = i == len(micros) - 1
            with parallel.gradients(last):
                loss = parallel.loss(tokens, targets)
                parallel.backward(loss, len(micros), last)
            total += loss.detach() / len(micros)
        self.stopwatch.mark()
        for callback in self.callbacks:
            callback.before_update(self)
        run.optimizer.watch.loss = total
        parallel.update(run.optimizer)
        self.stopwatch.mark()
        return total

    def _check_manifolds(self) -> None:
        """Hold weights against their manifolds before they are saved.

        Raises:
            FloatingPointError: one is so far off that a resume would refuse it.
        """
        try:
            self.run.optimizer.check_on_manifold()
        except UsageError as error:
            raise FloatingPointError(str(error)) from None

    def rewound(self) -> None:
        """Forget what was measured of the steps that will come again."""
        self.stopwatch.drop(everything=True)
        for logger in self.loggers:
            logger.rewind(self.step)
        for callback in self.callbacks:
            callback.on_rewind(self)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What is done in here takes no time of the training's: `elapsed` does not count it."""
        device = self.run.parallel.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what the device has still to do is training
        since = time.perf_counter()
        try:
            yield
        finally:
            self._resumed_at += time.perf_counter() - since

    def _read_clock(self) -> None:
        self.elapsed = time.perf_counter() - self._resumed_at
        if self.run.config.schedule.budget_seconds:
            # Ranks must agree on when to stop and on the learning rate.
            self.elapsed = self.run.parallel.from_main(self.elapsed)
