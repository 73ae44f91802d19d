"""The run card: what was run, on what, and what came of it, as card.json and card.md of a run."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf

import geon
from geon.configs.changes import plain
from geon.engine.callbacks import write_json
from geon.engine.runfolder import read_metrics
from geon.engine.trainer import Trainer

CARD, PAGE = "card.json", "card.md"


def write_card(trainer: Trainer, facts: Mapping[str, Any]) -> None:
    """Write card.json and card.md into the run folder (main rank).

    facts: those of report.json.
    """
    found = card(trainer, facts)
    write_json(trainer.folder / CARD, found)
    (trainer.folder / PAGE).write_text(page(found))


def card(trainer: Trainer, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What card.json holds. facts: those of report.json.

    `config` is that of the last segment. `commits` are those of all segments that the weights come
    from, and `dirty` says whether tracked files differed from the commit in any of them; null where
    it is not known. `seconds` are of training, evaluations left out; `step_seconds` is the median
    over the log, so that compiling is in `seconds` alone.
    """
    run, segments = trainer.run, facts["segments"]
    commits = [segment["commit"] for segment in segments]
    known = [commit for commit in commits if commit]
    steps = [row["step_seconds"] for row in read_metrics(trainer.folder, "train")]
    return {
        "format": 1,
        "name": facts["name"],
        "run": facts["run"],
        "seed": run.config.seed,
        "commits": list(dict.fromkeys(commit.removesuffix("+") for commit in known)),
        "dirty": any(commit.endswith("+") for commit in known) if all(commits) else None,
        "versions": {
            "geon": geon.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda if run.parallel.device.type == "cuda" else None,
            "python": platform.python_version(),
        },
        "hardware": list(dict.fromkeys(one["hardware"] for one in segments if one["hardware"])),
        "ranks": facts["ranks"],
        "layout": facts["layout"],
        "model": {
            "arch": run.config.model.arch.value,
            "parameters": facts["parameters"],
            "flops_per_token": run.model.flops_per_token(),
        },
        "optim": facts["optim"],
        "data": facts["data"],
        "steps": facts["steps"],
        "tokens": facts["tokens"],
        "seconds": facts["train_seconds"],
        "step_seconds": median(steps) if steps else None,
        "tokens_per_second": facts["tokens_per_second"],
        "val_tokens": facts["val_tokens"],
        "val_loss": facts["val_nats_per_token"],
        "losses": losses(trainer.folder),
        "segments": segments,
        "settings_changed": facts["settings_changed"],
        "config": plain(asdict(run.config)),
    }


def losses(folder: Path) -> list[dict[str, Any]]:
    """The loss table of a run, by step: step, tokens, seconds, val_loss in nats a token.

    It is made of metrics.jsonl, so it works while a run goes on, and over resumes in one folder.
    """
    rows = {row["step"]: row for row in read_metrics(folder, "eval")}
    return [
        {
            "step": step,
            "tokens": row["tokens"],
            "seconds": row["elapsed"],
            "val_loss": row["val_nats_per_token"],
        }
        for step, row in sorted(rows.items())
    ]


def page(found: Mapping[str, Any]) -> str:
    """The card in Markdown."""
    commits = ", ".join(found["commits"]) or "not known"
    versions = ", ".join(f"{name} {one}" for name, one in found["versions"].items() if one)
    model, data = found["model"], found["data"]
    flops = f"{model['flops_per_token'] / 1e9:.4g} GFLOP/token"
    rows = {
        "validation loss": f"{found['val_loss']:.5f} nats/token on {found['val_tokens']:,} tokens",
        "model": f"{model['arch']}, {model['parameters']:,} parameters, {flops}",
        "optimizer": found["optim"],
        "data": f"{data.get('name')}, sha256 {data.get('sha256', 'not known')}",
        "trained": f"{found['steps']:,} steps, {found['tokens']:,} tokens, "
        f"{found['seconds']:.1f} s without evaluations",
        "time per step": "not logged"
        if found["step_seconds"] is None
        else f"{1e3 * found['step_seconds']:.1f} ms (median)",
        "hardware": f"{'; '.join(found['hardware'])}; ranks {found['ranks']}, {found['layout']}",
        "versions": versions,
        "commit": commits + {True: ", with changed files", False: "", None: ""}[found["dirty"]],
        "seed": found["seed"],
        "run": found["run"],
    }
    if len(found["segments"]) > 1:
        rows["segments"] = "; ".join(
            f"steps {one['first']} to {one['last']}" for one in found["segments"]
        )
    if found["settings_changed"]:
        rows["changed on the way"] = ", ".join(found["settings_changed"])
    if (origin := found["segments"][0]["resumed"]) is not None:
        rows["begun from"] = f"step {origin['step']} of run {origin['run']}"
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    points = [
        f"| {row['step']:,} | {row['tokens']:,} | {row['seconds']:.1f} | {row['val_loss']:.5f} |"
        for row in found["losses"]
    ]
    return "\n".join(
        [
            f"# {found['name']}",
            "",
            *("| | |", "|---|---|", *table),
            "",
            *("| step | tokens | seconds | validation loss |", "|---:|---:|---:|---:|", *points),
            "",
            *("## Config", "", "```yaml", OmegaConf.to_yaml(found["config"]).rstrip(), "```"),
            "",
        ]
    )
