"""The callback that saves checkpoints, within the step or by a thread beside the training."""

import gc
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from geon.engine import checkpoint, kept, streaming, writing
from geon.engine.build import fingerprint
from geon.engine.integrity import COMMIT
from geon.engine.trainer import Callback, Trainer


class Staging:
    """Copies of tensors on the CPU, in buffers that are used again; pinned for a GPU's tensors."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of all tensors, complete when this returns; of a DTensor, of this rank's part."""
        copies: dict[str, Tensor] = {}
        cuda = False
        for name, tensor in tensors.items():
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            held = self._held.get(name)
            if held is None or held.shape != part.shape or held.dtype != part.dtype:
                held = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
                self._held[name] = held
            held.copy_(part, non_blocking=True)
            cuda |= part.is_cuda
            copies[name] = held
            if isinstance(tensor, DTensor):
                # Made directly: from_local would move the copy to the mesh's device.
                copies[name] = DTensor(held, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        if cuda:
            torch.cuda.current_stream().synchronize()
        return copies


class Checkpointer(Callback):
    """Saves a checkpoint every few steps and at the end.

    background: copy the tensors to the CPU within the step, and let a thread write them. A save
        waits for the one before it; an error of the thread is raised at the end of the first step
        that finds it, on every rank.
    """

    def __init__(self, every: int, keep: int, background: bool = False) -> None:
        self.every = every
        self.keep = keep
        self.background = background
        self._saved: int | None = None
        self._pending: Future[Path] | None = None
        self._staging = Staging()
        self._pool: ThreadPoolExecutor | None = None
        self._peers: writing.Peers | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Note whether the run's folder holds a checkpoint of the step that it starts from."""
        own = trainer.folder / "checkpoints" / checkpoint.folder_name(trainer.step)
        there = trainer.run.parallel.from_main(float((own / COMMIT).is_file()))
        self._saved = trainer.step if there else None
        trainer.health.wait_for_saves = self.wait

    def on_step(self, trainer: Trainer) -> None:
        """Save a checkpoint at intervals, and of the last step before it is evaluated."""
        self._look(trainer)
        ends = trainer.progress >= 1.0
        if ends or (self.every and trainer.step % self.every == 0):
            self.save(trainer)
        if ends:
            self.wait()

    def on_rewind(self, trainer: Trainer) -> None:
        """Note that the step that the run went back to is saved already."""
        self._saved = trainer.step

    def on_end(self, trainer: Trainer) -> None:
        """Save a checkpoint of the last step, and wait until it is committed."""
        if self._saved != trainer.step:
            self.save(trainer)
        self.wait()

    def _look(self, trainer: Trainer) -> None:
        """Take note, on all ranks in the same step, that a thread is done."""
        parallel = trainer.run.parallel
        if self._pending is not None:
            done = parallel.count(int(self._pending.done()))
            if done == (1 if parallel.mesh is None else parallel.env.world):
                self.wait()

    def wait(self) -> None:
        """Wait until what was handed over is committed; every rank must call.

        Raises:
            SaveError, FloatingPointError: of the thread, on every rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def save(self, trainer: Trainer) -> None:
        """Write one checkpoint, or hand it to the thread; every rank must call.

        Raises:
            FloatingPointError: a tensor is not finite; in the background, when it is waited for.
            SaveError: the disk is full, or failed; likewise.
        """
        self.wait()
        root = trainer.folder / "checkpoints"
        tensors = checkpoint.tensors(*trainer.run.tensors())
        facts = facts_of(trainer)
        if self.background:
            copies, step = self._staging.copy(tensors), trainer.step
            peers = self._beside(trainer)
            assert self._pool is not None
            self._pending = self._pool.submit(
                writing.save, root, step, copies, facts, self.keep, peers
            )
        else:
            peers = writing.Peers(trainer.run.parallel)
            writing.save(root, trainer.step, tensors, facts, self.keep, peers)
            gc.collect()
        self._saved = trainer.step

    def _beside(self, trainer: Trainer) -> writing.Peers:
        """Ranks over a group of the thread's own, made at the first save."""
        if self._peers is None:
            parallel = trainer.run.parallel
            self._pool = ThreadPoolExecutor(1, "checkpoint")
            group = None
            if parallel.mesh is not None:
                limit = timedelta(seconds=parallel.config.timeout_seconds)
                group = dist.new_group(backend="gloo", timeout=limit)
            self._peers = writing.Peers(parallel, group)
        return self._peers


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """What a commit file says of a run besides its tensors; every rank must call."""
    run = trainer.run
    codec = run.corpus.codec
    return {
        "elapsed": trainer.elapsed,
        "tokens": trainer.tokens,
        "world": run.parallel.env.world,
        "model": dict(fingerprint(run.model)),
        "optim": run.config.optim.name,
        "seed": run.config.seed,
        "data": run.corpus.facts,
        "codec": codec.serialise() if codec else None,
        "stream": streaming.facts(run.batches, trainer.step, run.parallel),
        "torch": torch.__version__,
        "state": kept.numbers(run.optimizer),
        **trainer.health.facts(run.optimizer),
        **trainer.facts,
    }
