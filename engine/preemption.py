"""A run that is asked to stop saves the step that all ranks are at, and leaves with status 75."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from geon.engine.trainer import Callback, Trainer
from geon.errors import Preempted
from geon.launch import signals

if TYPE_CHECKING:
    from geon.engine.checkpointer import Checkpointer


class Preemption(Callback):
    """Reads the flag that signals set (launch/signals.py), for all ranks alike.

    All ranks add up their flags once they have their gradients, beside the update, and read the sum
    after it. On a GPU they read it after the next step: no host waits for its GPU.

    Cost: one sum of one number a step.
    """

    def __init__(self, checkpointer: "Checkpointer") -> None:
        """checkpointer: saves what there is."""
        self.checkpointer = checkpointer
        self._sums: list[_Sum] = []

    def on_start(self, trainer: Trainer) -> None:
        """From here on signals wait for the end of a step."""
        self._sums.clear()
        signals.training(True)

    def before_update(self, trainer: Trainer) -> None:
        """Begin to add up."""
        self._sums.append(_Sum(trainer))

    def on_step(self, trainer: Trainer) -> None:
        """Save and leave, if any rank was asked to."""
        late = int(trainer.run.parallel.device.type == "cuda")
        asked = len(self._sums) > late and self._sums.pop(0).read()
        if asked and trainer.progress < 1.0:
            self.leave(trainer)

    def on_rewind(self, trainer: Trainer) -> None:
        """Read what is on its way; a signal of before is caught by the next step's sum."""
        self._read_all()

    def asked(self, trainer: Trainer) -> bool:
        """Whether any rank has been asked to stop by now; the hosts wait for each other."""
        return _Sum(trainer).read()

    def leave(self, trainer: Trainer) -> None:
        """Save, unless this step is saved already, and end the run.

        Raises:
            Preempted: on every rank.
        """
        trainer.run.parallel.enter("checkpointer")
        trainer.run.optimizer.settle()
        self.checkpointer.on_end(trainer)
        self.checkpointer.wait()
        for logger in trainer.loggers:
            logger.close()
        if not trainer.run.parallel.env.main:
            raise Preempted("")
        resume = trainer.run.config.checkpoint.resume
        how = "" if resume == "auto" else ", with checkpoint.resume=auto"
        raise Preempted(
            f"asked to stop: step {trainer.step} is saved in {trainer.folder}; start the same "
            f"command again to go on{how}"
        )

    def on_end(self, trainer: Trainer) -> None:
        """Nothing is left to lose: a signal ends the process."""
        self._read_all()
        signals.training(False)

    def _read_all(self) -> None:
        for begun in self._sums:
            begun.read()
        self._sums.clear()


class _Sum:
    """How many ranks have been asked to stop, on its way."""

    def __init__(self, trainer: Trainer) -> None:
        parallel = trainer.run.parallel
        # Filled by a kernel: a copy from the host would wait for the GPU.
        self._flag = torch.full((1,), float(bool(signals.caught())), device=parallel.device)
        self._work = None
        self._copied = None
        if parallel.mesh is not None:
            self._work = dist.all_reduce(self._flag, async_op=True)
        if parallel.device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # lets the stream wait, not the host
                self._work = None
            there = torch.empty(1, pin_memory=True)
            self._flag = there.copy_(self._flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """Wait for it; whether it is more than none."""
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag.item())
