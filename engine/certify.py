"""The certificate of a run's model: `mode=certify`, and lines of the log."""

import numpy as np
import torch
from torch import Tensor

from geon.data import Corpus
from geon.engine.build import Run
from geon.engine.trainer import Callback, Trainer
from geon.optim.modular.certificate import Certificate, certificate, measure, observe

OBSERVED = 4096
"""Validation tokens that are run to see what enters each RMSNorm; one window at least."""


@torch.no_grad()
def certify(run: Run) -> Certificate | None:
    """The certificate of a run's weights as they are; every rank must call, the main one has it.

    One whole weight is on a rank at a time, twice: to be measured, and to run validation tokens
    where the model has norms.
    """
    network, main = run.model.modular(), run.parallel.env.main
    sizes = measure(network, run.whole, main)
    tokens = _windows(run.corpus, run.config.model.context).to(run.parallel.device)
    smallest = observe(network, run.whole, tokens)
    return certificate(network, sizes, smallest, tokens.numel()) if main else None


def _windows(corpus: Corpus, context: int) -> Tensor:
    """First windows of the validation tokens, of each source of a mixture (windows, context)."""
    rows = []
    for part in corpus.parts.values() or [corpus]:
        count = min(len(part.val) // context, max(1, OBSERVED // context))
        rows += [part.val.window(i * context, context) for i in range(count)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


class Certify(Callback):
    """Logs bounds of the model every so often, and at the end.

    Cost: gathers every weight twice; on the main rank 11 products of each Gram, in float64.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step(self, trainer: Trainer) -> None:
        """Log the bounds at intervals and at the end."""
        if trainer.step % self.every and trainer.progress < 1.0:
            return
        with trainer.clock_stopped():
            found = certify(trainer.run)
        if found is not None:
            facts = found.to_dict()
            facts.pop("nodes")
            trainer.log("certificate", facts)
