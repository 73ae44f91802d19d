"""Micro-batches on the device, read one step ahead where a GPU computes meanwhile."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from geon.data.order import Batches


class Loader:
    """Micro-batches of this rank, step by step.

    With `ahead`, a thread reads the windows of the next step while the device computes, into pinned
    memory when that is a GPU, so that copies do not wait. What a step reads depends on the step
    alone; any step may be asked for. What fails in the thread is raised when its step is asked for.

    ahead: None reads ahead for a GPU only. On a CPU the thread would take a core from the model.
    """

    def __init__(self, batches: Batches, device: torch.device, ahead: bool | None = None) -> None:
        self._batches, self._device = batches, device
        self._next: tuple[int, Future[Tensor]] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if device.type == "cuda" if ahead is None else ahead:
            self._thread = ThreadPoolExecutor(1, "loader", self._start)

    def step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches at `step`: pairs (micro, T) of int64 inputs and targets, on the device."""
        return self._batches.pairs(self._read(step).to(self._device, non_blocking=True))

    def close(self) -> None:
        """Let the thread end, and what the batches read ahead; the loader may not be used after."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._batches.close()

    def _read(self, step: int) -> Tensor:
        if self._thread is None:
            return self._batches.windows_at(step)
        known, future = self._next or (None, None)
        if future is None or known != step:
            future = self._thread.submit(self._prepare, step)
        self._next = step + 1, self._thread.submit(self._prepare, step + 1)
        return future.result()

    def _start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # threads start at GPU 0, and would use it

    def _prepare(self, step: int) -> Tensor:
        windows = self._batches.windows_at(step)
        return windows.pin_memory() if self._device.type == "cuda" else windows
