"""Pictures of a run, drawn from its metrics.jsonl alone. Imports matplotlib: import this lazily."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from geon.engine.runfolder import read_metrics

matplotlib.use("Agg")
_INK, _ACCENT = "#1f2937", "#2563eb"


def plot_loss(folder: Path, yardsticks: dict[str, float] | None = None) -> Path | None:
    """Training and validation loss against tokens, with the yardsticks as lines."""
    train, val = read_metrics(folder, "train"), read_metrics(folder, "eval")
    if not train:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["tokens"] / 1e6 for r in train],
        [r["loss"] for r in train],
        color=_ACCENT,
        lw=1.2,
        label="training, nats/token",
    )
    per_byte = [r for r in val if r["val_nats_per_byte"] is not None]
    key = "val_nats_per_byte" if per_byte else "val_nats_per_token"
    axes.plot(
        [r["tokens"] / 1e6 for r in val],
        [r[key] for r in val],
        "o-",
        color=_INK,
        ms=4,
        lw=1,
        label=f"validation, {'nats/byte' if per_byte else 'nats/token'}",
    )
    for name, value in (yardsticks or {}).items():
        axes.axhline(value, color="#9ca3af", lw=0.8, ls="--")
        axes.annotate(f"{name} {value:.3f}", (0, value), va="bottom", fontsize=8, color="#6b7280")
    axes.set_xlabel("tokens, millions")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder / "loss.png")


def plot_spectrum(folder: Path) -> Path | None:
    """Quantiles of the hidden weights' singular values over training."""
    rows = read_metrics(folder, "spectrum")
    if not rows:
        return None
    steps = [r["step"] for r in rows]
    bands = list(zip(*[r["singular_values"] for r in rows], strict=True))
    quantiles = rows[0]["quantiles"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for i in range(len(quantiles) // 2):
        low, high = quantiles[i], quantiles[-1 - i]
        axes.fill_between(
            steps,
            bands[i],
            bands[-1 - i],
            color=_ACCENT,
            alpha=0.15 * (i + 1),
            lw=0,
            label=f"{low:.0%} to {high:.0%}",
        )
    axes.plot(steps, bands[len(bands) // 2], color=_INK, lw=1.2, label="median")
    axes.set_ylim(0, 1.15 * max(bands[-1]))
    axes.set_xlabel("step")
    axes.set_ylabel("singular value, RMS to RMS")
    axes.set_title("spectrum of the hidden weights", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, folder / "spectrum.png")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
