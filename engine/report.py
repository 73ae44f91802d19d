"""The end of a run: sample, pictures, card, report.json and the table that is printed."""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geon.engine import history
from geon.engine.callbacks import Evaluator, write_json
from geon.engine.card import write_card
from geon.engine.differences import changed_settings
from geon.engine.evaluate import Evaluation, val_bytes, val_text, val_windows
from geon.engine.loggers import reason, say, warn
from geon.engine.metrics import hardware, yardsticks
from geon.engine.runfolder import REPORT, objective, read_metrics
from geon.engine.sample import sample
from geon.engine.trainer import Callback, Trainer

_BITS = 1.0 / np.log(2.0)


class Report(Callback):
    """Last callback: writes the sample, pictures, card and report.json of a finished run."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def on_end(self, trainer: Trainer) -> None:
        """Sample text on every rank; write and print the report on the main one."""
        text = self._sample(trainer)
        if not trainer.run.parallel.env.main:
            return
        facts = self._facts(trainer)
        write_card(trainer, facts)  # before the report, which says that the run has finished
        write_json(trainer.folder / REPORT, facts)
        try:
            draw(trainer.folder, facts)
        except Exception as error:  # matplotlib is missing or broken, or the disk is full
            warn(
                f"no pictures were drawn ({reason(error)}): draw them by "
                f"`python -m geon.scripts.plot {trainer.folder}`"
            )
        if text is not None:
            (trainer.folder / "sample.txt").write_text(text)
            say(f"\n--- sample ---\n{text}\n--------------")
        say(f"\n{table(facts)}")

    def _sample(self, trainer: Trainer) -> str | None:
        run, config = trainer.run, trainer.run.config.eval
        codec = run.corpus.codec
        if not config.sample_tokens or codec is None:
            return None
        ids = codec.encode(config.sample_prompt or "\n").astype(np.int64)
        with run.parallel.eager():
            tokens = sample(
                run.model,
                torch.from_numpy(ids).to(run.parallel.device),
                config.sample_tokens,
                config.sample_temperature,
                torch.Generator().manual_seed(run.config.seed),
            )
        return codec.decode(tokens.tolist()).decode("utf-8", errors="replace")

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        run = trainer.run
        evaluation = self._evaluator.last
        assert evaluation is not None
        train = read_metrics(trainer.folder, "train")
        context = run.config.model.context
        text, size = b"", 0
        for part in run.corpus.parts.values() or [run.corpus]:
            windows = val_windows(part, context, run.config.data.val_tokens)
            size += val_bytes(part, context, windows)
            # A mixture's sources differ in share: no coder's figure of their text is beside its.
            text = b"" if run.corpus.parts else val_text(part, context, windows)
        return {
            "name": run.config.name,
            **_lineage(trainer),
            "task": run.config.task.value,
            "optim": run.config.optim.name,
            "parameters": run.model.parameter_count(),
            "ranks": run.parallel.env.world,
            "layout": run.config.parallel.layout.value,
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "train_bytes_seen": _bytes_seen(trainer, evaluation),
            "train_seconds": trainer.elapsed,
            **evaluation.to_dict(),
            "objective": objective(trainer.folder, run.config.eval.objective),
            "val_bytes": size,
            **yardsticks(text),
            "tokens_per_second": float(np.median([r["tokens_per_second"] for r in train]))
            if train
            else None,
            "optimizer_share": float(np.median([r["optimizer_share"] for r in train]))
            if train
            else None,
            "optimizer_state_bytes": run.optimizer.state_bytes(),
            "peak_memory_bytes": trainer.memory.training,
            "peak_memory_bytes_predicted": run.predicted.peak if run.predicted else None,
            "matrices_orthogonalized_per_step": run.optimizer.plan.orthogonalized,
            "data": run.corpus.facts,
            "hardware": hardware(run.parallel.device.type),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "folder": str(trainer.folder),
        }


def _lineage(trainer: Trainer) -> dict[str, Any]:
    """Id of the run, the segments that its weights come from, and settings that changed on the way.

    They are the last segment's wherever `settings_changed` does not name them.
    """
    past = history.read(trainer.folder)
    segments = past.told(trainer.step)
    for one in segments:
        one["changed"] = changed_settings(one["changed"])
    changed = sorted({key for one in segments for key in one["changed"]})
    return {"run": past.run, "segments": segments, "settings_changed": changed}


def _bytes_seen(trainer: Trainer, last: Evaluation) -> int | None:
    """Bytes of text trained on: exact for bytes; else by the mean length of validation's tokens."""
    if not last.nats_per_byte:
        return None
    return round(trainer.tokens * last.nats_per_token / last.nats_per_byte)


def draw(folder: Path, facts: dict[str, Any]) -> list[Path]:
    """Draw the pictures of a run folder."""
    from geon.engine.plots import plot_loss, plot_spectrum

    lines = {k: facts[k] for k in ("zlib", "bz2") if k in facts}
    drawn = [plot_loss(folder, lines), plot_spectrum(folder)]
    return [path for path in drawn if path is not None]


def table(facts: dict[str, Any]) -> str:
    """Closing table of a run, for people."""
    rows: list[tuple[str, str]] = [
        ("model", f"{facts['parameters']:,} parameters, optim={facts['optim']}"),
        ("ranks", f"{facts['ranks']}, parallel={facts['layout']}"),
        ("trained", f"{facts['steps']:,} steps, {facts['tokens']:,} tokens, "
                    f"{facts['train_seconds']:.0f} s"),
    ]  # fmt: skip
    if facts["train_bytes_seen"]:
        rows.append(("bytes seen", f"{facts['train_bytes_seen']:,}"))
    if "val_accuracy" in facts:
        told = f"{facts['val_accuracy']:.2%} of {facts['val_tokens']:,} images"
        rows.append(("validation", f"{told}, {facts['val_nats_per_token']:.4f} nats/image"))
    elif facts["val_nats_per_byte"] is None:
        rows.append(("validation", f"{facts['val_nats_per_token']:.4f} nats/token"))
    else:
        rows.append(("validation", _nats_and_bits(facts["val_nats_per_byte"])))
        labels = {"order0": "  order-0 entropy", "zlib": "  zlib -9", "bz2": "  bz2 -9"}
        known = [key for key in labels if key in facts]
        rows += [(labels[key], _nats_and_bits(facts[key])) for key in known]
    for key, value in facts.items():
        if key.startswith("val_nats_per_token."):
            rows.append((f"  {key.partition('.')[2]}", f"{value:.4f} nats/token"))
    if facts["optimizer_share"] is not None:
        rows.append(("speed", f"{facts['tokens_per_second']:,.0f} tokens/s"))
        rows.append(("optimizer", f"{facts['optimizer_share']:.1%} of step time, "
                     f"{facts['matrices_orthogonalized_per_step']} matrices orthogonalized "
                     "per step"))  # fmt: skip
    rows.append(("files", facts["folder"]))
    return "\n".join(f"{label:<18} {value}" for label, value in rows)


def _nats_and_bits(nats: float) -> str:
    return f"{nats:.4f} nats/byte   {nats * _BITS:.4f} bits/byte"
