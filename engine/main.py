"""One run from a checked config: validate, build, make the folder, fit."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf

from geon.configs.schema import Config, Mode
from geon.engine import build, checkpoint, fitting, planning, runfolder, writing
from geon.engine.callbacks import Compilation, Evaluator, Progress, Spectrum, write_json
from geon.engine.checkpointer import Checkpointer
from geon.engine.checks import check, check_launched
from geon.engine.curvature import Curvature
from geon.engine.devices import pick_device
from geon.engine.exhaustion import explained
from geon.engine.geometry import Geometry, RecordPairs
from geon.engine.health import check_health
from geon.engine.loggers import open_loggers
from geon.engine.parallel import Parallel, start
from geon.engine.preemption import Preemption
from geon.engine.report import Report
from geon.engine.trainer import Callback, Trainer
from geon.engine.watch import Watch
from geon.errors import UsageError
from geon.launch.env import Env
from geon.optim import Baseline


def execute(config: Config, env: Env) -> None:
    """Do what `config.mode` says.

    Raises:
        UsageError: bad input, found before a process group or a run folder exists wherever the
            input allows.
        OutOfMemory: on each rank that has no more.
    """
    if config.mode is Mode.plan:
        if env.main:
            world = config.plan.world_size or env.world
            print(planning.report_plan(config, world), flush=True)
            check(config, world)
        return
    train(config, env)


def train(config: Config, env: Env) -> None:
    """Train one run to its end."""
    trainer, resume = prepare(config, env, _callbacks(config))
    parallel = trainer.run.parallel
    parallel.barrier()
    if env.main:
        _prepare_folder(trainer, resume)
    parallel.barrier()
    with Watch(trainer), explained(config, trainer.run.predicted, env.rank):
        trainer.fit()
        parallel.barrier()


def prepare(config: Config, env: Env, callbacks: Sequence[Callback]) -> tuple[Trainer, Path | None]:
    """Check a config, join the process group, build the run. Nothing is written.

    Returns: a trainer that is ready to step, and the checkpoint that it starts from, if any.

    Raises:
        UsageError: as `execute` does.
    """
    check_launched(config, env.launched)
    place = pick_device(config.device, env.local_rank, config.parallel.share_gpu)
    checked = check(config, env.world, env.rank, place.type)
    model, routing = checked.model, checked.routing
    check_health(config, routing)
    parallel = start(config.parallel, config.device, env)
    resume = _agreed_resume(config, build.fingerprint(model), parallel)
    plan = planning.plan_ahead(config, model, routing, env.world)
    memory = fitting.fit(config, model, routing, plan, parallel)
    batches = replace(checked.batches, micro=memory.micro_batch)
    parallel.loss_chunks = memory.loss_chunks
    with explained(config, memory, env.rank, "building the model"):
        run = build.build(config, parallel, checked.corpus, batches, model, routing)
    run.predicted = memory
    folder = Path(config.output) / config.name
    trainer = Trainer(run, folder, callbacks)
    if any(isinstance(rule, Baseline) for rule in routing.rules.values()):
        trainer.callbacks = [Curvature(), *trainer.callbacks]
    trainer.health.restore = partial(_resume, trainer)
    if resume is not None:
        _resume(trainer, resume)
    return trainer, resume


def _callbacks(config: Config) -> list[Callback]:
    saved = config.checkpoint
    checkpointer = Checkpointer(saved.every, saved.keep, saved.background)
    preemption = Preemption(checkpointer)
    evaluator = Evaluator(config.eval.every, preemption)
    callbacks: list[Callback] = [
        Progress(config.logger.every, config.logger.progress),
        evaluator,
        checkpointer,
        Report(evaluator),
        preemption,
        Compilation(),
    ]
    if config.logger.spectrum_every:
        callbacks.insert(1, Spectrum(config.logger.spectrum_every))
    if config.logger.geometry_every:
        callbacks.insert(1, Geometry(config.logger.geometry_every))
    if config.optim.record_pairs:
        callbacks.append(RecordPairs(config.optim.record_pairs))
    return callbacks


def _agreed_resume(config: Config, model: Mapping[str, Any], parallel: Parallel) -> Path | None:
    """Checkpoint to start from, chosen by the main rank for all.

    Raises:
        UsageError: on every rank.
    """
    found, error = None, None
    try:
        if parallel.env.main:
            found = _find_resume(config, model, parallel.env)
    except UsageError as caught:
        error = str(caught)
    found, error = parallel.gather((found, error))[0]
    if error is not None:
        raise UsageError(error)
    return found


def _find_resume(config: Config, model: Mapping[str, Any], env: Env) -> Path | None:
    """Checkpoint to start from, checked against the model.

    A job that torchrun restarts goes on from its own checkpoint whatever it first started from.

    Raises:
        UsageError: a path without a checkpoint, or a checkpoint of another model.
    """
    wish = "auto" if env.restart else config.checkpoint.resume
    if wish == "never":
        return None
    place = Path(config.output) / config.name if wish == "auto" else Path(wish).expanduser()
    for line in writing.recover(place / "checkpoints") if wish == "auto" else ():
        print(line, flush=True)
    choice = checkpoint.newest_sound(place, fall_back=wish == "auto")
    if choice.path is None and wish != "auto":
        raise UsageError(
            f"checkpoint.resume '{wish}' holds no committed checkpoint "
            "(expected a run folder, or auto, or never)"
        )
    for line in choice.said:
        print(line, flush=True)
    if choice.path is not None:
        checkpoint.check_same_model(choice.path, choice.facts, model)
    return choice.path


def _resume(trainer: Trainer, path: Path) -> None:
    run = trainer.run
    facts = checkpoint.read_commit(path)
    checkpoint.begin_state(path, facts, run.optimizer)
    weights, state = run.tensors()
    checkpoint.load(path, weights, state, run.parallel)
    if run.parallel.backend is not None:
        run.parallel.backend.load(weights, state)
    run.optimizer.check_on_manifold()
    trainer.health.load(facts, run.optimizer)
    trainer.step, trainer.elapsed = facts["step"], facts["elapsed"]
    if run.parallel.env.main:
        print(f"resuming from {path} at step {trainer.step}", flush=True)


def _prepare_folder(trainer: Trainer, resume: Path | None) -> None:
    """Make or continue the run folder, and open the loggers (main rank)."""
    run, folder = trainer.run, trainer.folder
    continued = resume is not None and folder in resume.parents
    if continued:
        runfolder.drop_after(folder, trainer.step)
    elif (aside := runfolder.move_aside(folder)) is not None:
        print(f"moved the earlier run to {aside}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"output '{run.config.output}': {error}") from None
    settings = plain(asdict(run.config))
    OmegaConf.save(OmegaConf.create(settings), folder / runfolder.CONFIG)
    assert run.predicted is not None
    facts = planning.plan_facts(run.model, run.routing, run.optimizer.plan, run.predicted)
    write_json(folder / runfolder.PLAN, facts)
    try:
        trainer.loggers = open_loggers(
            folder, run.config.logger, run.config.name, settings, uuid4().hex[:12], trainer.step
        )
    except Exception:
        if not continued:
            shutil.rmtree(folder)  # nothing has run: leave no half-made folder
        raise
    trainer.log(
        "start",
        {
            "data": run.corpus.facts,
            "parameters": run.model.parameter_count(),
            "flops_per_token": run.model.flops_per_token(),
            "ranks": run.parallel.env.world,
            "accumulation": run.batches.accumulation,
        },
    )
    print(_headline(run.parallel, trainer), flush=True)


def _headline(parallel: Parallel, trainer: Trainer) -> str:
    run = trainer.run
    assert run.predicted is not None
    return (
        f"{run.routing.table()}\n{run.optimizer.plan.table()}\n{planning.describe(run.model)}\n"
        f"data: {run.corpus.facts}\n"
        f"{parallel.env.world} ranks on {parallel.device.type}, "
        f"{run.config.data.batch_tokens:,} tokens a step in {run.batches.accumulation} "
        f"micro-batches a rank\n{run.predicted.summary()}"
    )


def plain(value: Any) -> Any:
    """Replace the enums in nested dicts and lists by their values."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value
