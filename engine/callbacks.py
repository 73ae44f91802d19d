"""What happens around the loop: logging, evaluation, spectra."""

import gc
import json
import math
import time
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from geon.configs.choices import Task
from geon.engine.evaluate import Evaluation, evaluate
from geon.engine.exhaustion import explained
from geon.engine.images import evaluate_images
from geon.engine.loggers import say
from geon.engine.metrics import peak_flops
from geon.engine.preemption import Preemption
from geon.engine.trainer import Callback, Trainer
from geon.optim import HybridOptimizer, Role, Rule, block_scale
from geon.optim.step import local

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress(Callback):
    """Metrics every few steps, and a bar on a terminal or lines elsewhere."""

    def __init__(self, every: int, show: bool) -> None:
        self.every = every
        self.show = show
        self._bar: Any = None
        self._last = (0, 0.0)
        self._losses: list[Tensor] = []

    def on_start(self, trainer: Trainer) -> None:
        """Open the progress bar."""
        self._last = (trainer.step, time.perf_counter())
        if trainer.run.parallel.env.main and self.show:
            self._bar = tqdm(
                total=trainer.run.config.schedule.steps,
                initial=trainer.step,
                unit="step",
                disable=None,
                ncols=min(get_terminal_size().columns, 120),
                bar_format=_BAR,
            )

    def on_step(self, trainer: Trainer) -> None:
        """Advance the progress bar; log metrics at intervals."""
        if trainer.loss is not None:
            self._losses.append(trainer.loss)
        if self._bar is not None:
            self._bar.update(1)
        ends = trainer.progress >= 1.0
        if not self._losses or (trainer.step % self.every and not ends):
            return
        loss = trainer.run.parallel.mean(torch.stack(self._losses).mean()).item()
        # After a resume, or where a step was skipped, a row averages fewer steps than others do.
        record = {"loss": loss, "loss_steps": len(self._losses), **self._record(trainer)}
        self._losses.clear()
        trainer.log("train", record)
        self._print(trainer, record)

    def on_rewind(self, trainer: Trainer) -> None:
        """Measure from the step that the run went back to."""
        self._last, self._losses = (trainer.step, time.perf_counter()), []
        if self._bar is not None:
            self._bar.n = trainer.step

    def _record(self, trainer: Trainer) -> dict[str, Any]:
        run = trainer.run
        model_seconds, optimizer_seconds = trainer.stopwatch.read()
        steps, now = trainer.step - self._last[0], time.perf_counter()
        rate = steps * run.config.data.batch_tokens / (now - self._last[1])
        self._last = (trainer.step, now)
        record = {
            "tokens": trainer.tokens,
            "elapsed": trainer.elapsed,
            "tokens_per_second": rate,
            "lr_fraction": trainer.lr_fraction,
            "step_seconds": (model_seconds + optimizer_seconds) / steps,
            "optimizer_share": optimizer_seconds / (model_seconds + optimizer_seconds),
            "matrices_orthogonalized": run.optimizer.plan.orthogonalized,
            "optimizer_seconds": optimizer_seconds / steps,
            "optimizer_seconds_predicted": run.optimizer.plan.seconds,
            "solver_fallbacks": run.parallel.count(run.optimizer.readings.fallbacks()),
            "optimizer_bytes_sent": run.optimizer.exchange.bytes_sent,
            "flops_per_second": rate * run.model.flops_per_token(),
            "peak_memory_bytes": trainer.memory.read(),
            "state_bytes_per_parameter": _state_bytes(run.optimizer),
        }
        if trainer.health.skipped:
            record["skipped"] = trainer.health.skipped
        if run.optimizer.watch.cut:
            record["gradients_cut"] = run.optimizer.watch.cut
        if run.optimizer.entry_norm is not None:
            record["grad_norm_elementwise"] = float(run.optimizer.entry_norm)
        peak = peak_flops(run.parallel.device)
        if peak is not None:
            record["mfu"] = record["flops_per_second"] / (peak * run.parallel.env.world)
        return record

    def _print(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self._bar is None:
            return
        left = trainer.elapsed * (1.0 / max(trainer.progress, 1e-9) - 1.0)
        text = (
            f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s, "
            f"{max(left, 0):.0f} s left"
        )
        if self._bar.disable:
            say(f"step {trainer.step}: {text}")
        else:
            self._bar.set_postfix_str(text)

    def on_end(self, trainer: Trainer) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _state_bytes(optimizer: HybridOptimizer) -> float:
    """Bytes of optimizer state over parameters, of what this rank holds of either."""
    held = sum(local(param).numel() for _, param in optimizer.named_parameters())
    return optimizer.state_bytes() / max(1, held)


class Compilation(Callback):
    """Says why the first step takes long, and how long it took; the last callback to start."""

    def __init__(self) -> None:
        self._since: float | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Announce the compilation."""
        if trainer.run.parallel.env.main and trainer.run.parallel.compiles:
            print("compiling the model (parallel.compile=false trains without)", flush=True)
            self._since = time.perf_counter()

    def before_update(self, trainer: Trainer) -> None:
        """Print the seconds until the first gradients."""
        if self._since is not None:
            seconds = time.perf_counter() - self._since
            print(f"compiled, and the first gradients found, in {seconds:.0f} s", flush=True)
            self._since = None


class Evaluator(Callback):
    """Logs the validation loss every few steps and at the end."""

    def __init__(self, every: int, preemption: Preemption | None = None) -> None:
        """preemption: asked between batches; it ends the run in the midst of an evaluation."""
        self.every = every
        self.preemption = preemption
        self.last: Evaluation | None = None

    def on_step(self, trainer: Trainer) -> None:
        """Evaluate the model at intervals, but not at the end twice."""
        if self.every and trainer.step % self.every == 0 and trainer.progress < 1.0:
            self.evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Evaluate the trained model."""
        self.evaluate(trainer)

    def evaluate(self, trainer: Trainer) -> None:
        """Run and log one evaluation."""
        run, ask = trainer.run, self.preemption
        trainer.memory.pause()
        rank = run.parallel.env.rank
        with trainer.clock_stopped(), explained(run.config, run.predicted, rank, "evaluation"):
            stop = None if ask is None else lambda: ask.asked(trainer)
            most, batch = run.config.data.val_tokens, run.config.eval.batch
            if run.config.task is Task.image:
                self.last = evaluate_images(run.parallel, run.corpus, most, batch, stop)
            else:
                context = run.config.model.context
                self.last = evaluate(run.parallel, run.corpus, context, most, batch, stop)
        if self.last is None and ask is not None:
            ask.leave(trainer)
        assert self.last is not None
        if not math.isfinite(self.last.nats_per_token):
            raise FloatingPointError(
                f"the validation loss is {self.last.nats_per_token}: lower optim.lr"
            )
        record = {"tokens": trainer.tokens, "elapsed": trainer.elapsed}
        record["peak_memory_bytes"] = trainer.memory.set_aside()
        trainer.log("eval", record | self.last.to_dict())
        if run.parallel.env.main:
            with tqdm.external_write_mode():
                say(f"step {trainer.step}: validation loss {told(self.last)}")
        gc.collect()


def told(evaluation: Evaluation) -> str:
    """A validation loss with its unit, for people."""
    if evaluation.accuracy is not None:
        return f"{evaluation.nats_per_token:.4f} nats/image, accuracy {evaluation.accuracy:.2%}"
    if evaluation.nats_per_byte is None:
        return f"{evaluation.nats_per_token:.4f} nats/token"
    return f"{evaluation.nats_per_byte:.4f} nats/byte"


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Spectrum(Callback):
    """Singular values of the hidden matrices, scaled so that RMS -> RMS norm 1 is 1.

    Cost: gathers every hidden matrix, and one SVD each on the main rank.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_start(self, trainer: Trainer) -> None:
        """Record the spectrum of the initial weights."""
        if trainer.step == 0:
            self.record(trainer)

    def on_step(self, trainer: Trainer) -> None:
        """Record the spectrum at intervals and at the end."""
        if trainer.step % self.every == 0 or trainer.progress >= 1.0:
            self.record(trainer)

    @torch.no_grad()
    def record(self, trainer: Trainer) -> None:
        """Log quantiles over all hidden matrices, and the largest manifold residual."""
        run = trainer.run
        values, residuals = [], [torch.zeros(())]
        for info in run.routing.infos:
            if info.role is not Role.HIDDEN:
                continue
            whole = run.whole(info.name)
            if not run.parallel.env.main:
                continue
            rule = run.routing.rule(info)
            for block in run.routing.blocks(info):
                matrix = whole[block.slices].float()
                rows, cols = block.whole or block.box
                one = (rows / cols) ** 0.5
                values.append(torch.linalg.svdvals(matrix).cpu() / one)
                if isinstance(rule, Rule):
                    unit = matrix / block_scale(rule, block)
                    residuals.append(rule.manifold.residual(unit).cpu())
        if values:
            points = torch.tensor(QUANTILES)
            trainer.log(
                "spectrum",
                {
                    "quantiles": list(QUANTILES),
                    "singular_values": torch.quantile(torch.cat(values), points).tolist(),
                    "manifold_residual": float(torch.stack(residuals).max()),
                },
            )


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people: indented, with a last line end."""
    path.write_text(json.dumps(content, indent=2) + "\n")
