"""The run folder while a segment is trained: made or continued, and what is written when."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from geon.configs.changes import plain
from geon.engine import checkpoint, history, planning, runfolder, writing
from geon.engine.callbacks import write_json
from geon.engine.lock import Lock
from geon.engine.loggers import open_loggers
from geon.engine.resume import Choice
from geon.engine.trainer import Callback, Trainer
from geon.errors import UsageError


def open_folder(trainer: Trainer, choice: Choice, lock: Lock) -> None:
    """Make or continue the run folder, and open the loggers (main rank).

    Raises:
        UsageError: another process has made the folder meanwhile.
    """
    folder = trainer.folder
    if not choice.continues:
        _make(folder, lock)
    history.name(folder, choice.run)
    # Before anything is moved: should this process die here, the next goes on from there too.
    history.append(folder, _start_row(trainer, choice))
    if choice.continues:
        branch = _set_aside(folder / "checkpoints", choice)
        runfolder.drop_after(folder, trainer.step if choice.path else -1, branch)
    else:
        _write_config(trainer)
    run = trainer.run
    assert run.predicted is not None
    plan = planning.plan_facts(run.model, run.routing, run.optimizer.plan, run.predicted)
    write_json(folder / runfolder.PLAN, plan)
    settings = plain(asdict(run.config))
    name, logger = run.config.name, run.config.logger
    try:
        trainer.loggers = open_loggers(folder, logger, name, settings, choice.run, trainer.step)
    except Exception:
        if not choice.continues:
            shutil.rmtree(folder)  # nothing has run: leave no half-made folder
        raise
    trainer.log(
        "start",
        {
            "run": choice.run,
            "segment": choice.segment,
            "data": run.corpus.facts,
            "parameters": run.model.parameter_count(),
            "flops_per_token": run.model.flops_per_token(),
            "ranks": run.parallel.env.world,
            "accumulation": run.batches.accumulation,
        },
    )
    print(_headline(trainer), flush=True)


def _make(folder: Path, lock: Lock) -> None:
    if folder.exists() and not lock.held:  # it was not there when this run chose its start
        raise _made_meanwhile(folder)
    if (aside := runfolder.move_aside(folder)) is not None:
        lock.moved(aside)
        print(f"moved the earlier run to {aside}", flush=True)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise _made_meanwhile(folder) from None
    except OSError as error:
        raise UsageError(f"run folder '{folder}' cannot be made: {error} (output, name)") from None
    lock.take(folder)


def _made_meanwhile(folder: Path) -> UsageError:
    return UsageError(
        f"run folder '{folder}' was made by another process meanwhile: choose another name"
    )


def _start_row(trainer: Trainer, choice: Choice) -> dict[str, object]:
    parallel = trainer.run.parallel
    row: dict[str, object] = {
        "event": "start",
        "segment": choice.segment,
        "run": choice.run,
        "started": history.now(),
        "first": trainer.step,
        "resumed": choice.origin,
        "overrides": trainer.words,
        "changed": {c.key: [c.old, c.new] for c in choice.changed},
        **history.surroundings(parallel.env, parallel.device.type),
    }
    if choice.path is None or choice.facts.get("run") != choice.run:
        row["settings"] = trainer.facts["settings"]
    return row


def _set_aside(root: Path, choice: Choice) -> Path | None:
    """Move checkpoints of later steps into a folder branch-<k>, if there are any.

    Returns: that folder.
    """
    step = choice.facts.get("step", -1)
    newer = [path for path in checkpoint.folders(root) if checkpoint.step_of(path) > step]
    if not newer:
        return None
    k = 1
    while (branch := root / f"branch-{k}").exists():
        k += 1
    branch.mkdir()
    for path in sorted(newer, reverse=True):
        path.rename(branch / path.name)
    if choice.path is not None:
        writing.point_to(root, choice.path.name)
    print(f"moved {len(newer)} later checkpoints to {branch}: step {step} goes on", flush=True)
    return branch


def _write_config(trainer: Trainer) -> None:
    settings = OmegaConf.create(trainer.facts["settings"])
    aside = trainer.folder / f"{runfolder.CONFIG}.writing"
    OmegaConf.save(settings, aside)
    aside.replace(trainer.folder / runfolder.CONFIG)
    words = "".join(f"{word}\n" for word in trainer.words)
    (trainer.folder / runfolder.OVERRIDES).write_text(words)


class FirstStep(Callback):
    """Lets config.yaml be that of a segment once it has trained; the report of before moves."""

    def __init__(self) -> None:
        self._done = False

    def on_step(self, trainer: Trainer) -> None:
        """Write once."""
        if trainer.run.parallel.env.main and not self._done:
            _write_config(trainer)
            runfolder.report_aside(trainer.folder)
        self._done = True


@contextmanager
def segment(trainer: Trainer, choice: Choice) -> Iterator[None]:
    """Around the training of a segment: its end goes into the history (main rank)."""

    def end(reason: str) -> None:
        if trainer.run.parallel.env.main:
            row = {"event": "end", "segment": choice.segment, "ended": history.now()}
            history.append(trainer.folder, row | {"last": trainer.step, "reason": reason})

    try:
        yield
    except BaseException as error:
        try:
            words = str(error).splitlines()[:1]
            end(f"{type(error).__name__}: {words[0][:200]}" if words else type(error).__name__)
        except OSError as failed:
            print(f"{trainer.folder / history.HISTORY} lacks the end: {failed}", flush=True)
        raise
    end("finished")


def _headline(trainer: Trainer) -> str:
    run, parallel = trainer.run, trainer.run.parallel
    assert run.predicted is not None
    return (
        f"{run.routing.table()}\n{run.optimizer.plan.table()}\n{planning.describe(run.model)}\n"
        f"data: {run.corpus.facts}\n"
        f"{parallel.env.world} ranks on {parallel.device.type}, "
        f"{run.config.data.batch_tokens:,} tokens a step in {run.batches.accumulation} "
        f"micro-batches a rank\n{run.predicted.summary()}"
    )
