"""One run from a checked config: check, choose what it starts from, build, fit."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from geon.configs.changes import flat, plain
from geon.configs.choices import Format, Source
from geon.configs.schema import Config, Mode
from geon.engine import build, fitting, planning, pretrained, resume
from geon.engine.agreement import check_alike, on_main
from geon.engine.callbacks import Compilation, Evaluator, Progress, Spectrum
from geon.engine.certify import Certify, certify
from geon.engine.checkpointer import Checkpointer
from geon.engine.checks import Checked, absent, check, check_launched, count_ids
from geon.engine.console import Console
from geon.engine.curvature import Curvature
from geon.engine.devices import pick_device
from geon.engine.evaluate import check_val
from geon.engine.exhaustion import explained
from geon.engine.geometry import Geometry, RecordPairs
from geon.engine.lock import Lock
from geon.engine.opening import FirstStep, open_folder, segment
from geon.engine.parallel import Parallel, start
from geon.engine.preemption import Preemption
from geon.engine.pretrained import Pretrained
from geon.engine.report import Report
from geon.engine.resume import Choice
from geon.engine.runfolder import objective
from geon.engine.sources import with_validation
from geon.engine.trackers import check_key
from geon.engine.trainer import Callback, Trainer
from geon.engine.watch import Watch
from geon.launch.env import Env
from geon.optim import Baseline


def execute(config: Config, env: Env, words: Sequence[str] = ()) -> float | None:
    """Do what `config.mode` says.

    words: the overrides that made the config, which a run folder keeps.

    Returns:
        The run's objective (eval.objective), on every rank; None of other modes.

    Raises:
        UsageError: bad input, found before a process group or a run folder exists wherever the
            input allows.
        OutOfMemory: on each rank that has no more.
    """
    if config.mode is Mode.plan:
        if env.main:
            world = config.plan.world_size or env.world
            corpus = count_ids(config)
            print(planning.report_plan(config, world), flush=True)
            missing = None if corpus else absent(config)
            corpus = corpus or missing
            checked = check(config, world, corpus=corpus)
            if config.model.init_from:
                Pretrained(config.model.init_from, checked.model)
            if missing is not None:
                print(
                    f"data: '{config.data.dir}' (data.dir) does not exist yet, so nothing of it "
                    f"was checked: {config.data.vocab_size} ids are those of data.vocab_size",
                    file=sys.stderr,
                )
            if config.data.source is Source.stream and config.plan.format is Format.table:
                print(f"data, of which nothing was read: {checked.corpus.facts}")
        return None
    if config.mode is Mode.certify:
        found = certify(prepare(config, env, [])[0].run)
        if found is not None:
            print(found.table(), flush=True)
        return None
    return train(config, env, words)


def train(config: Config, env: Env, words: Sequence[str] = ()) -> float:
    """Train one run to its end; returns its objective, on every rank."""
    lock, folder = Lock(env.job), Path(config.output) / config.name
    try:
        checked = check_alone(config, env)
        if env.main:
            check_key(config.logger)
        parallel = start(config.parallel, config.device, env)
        with Console(env.main) as console, Watch(parallel) as watch:
            begun = begin(config, checked, parallel, lock)
            if begun.choice.finished:
                _say_finished(begun)
            else:
                trainer = assemble(begun, _callbacks(config))
                trainer.words = list(words)
                watch.follow(trainer)
                on_main(parallel, lambda: open_folder(trainer, begun.choice, lock))
                console.keep(folder)
                memory = explained(config, trainer.run.predicted, env.rank)
                with segment(trainer, begun.choice), memory:
                    trainer.fit()
                    parallel.barrier()
            own = objective(folder, config.eval.objective) if env.main else 0.0
            return parallel.from_main(own)
    finally:
        lock.release()


@dataclass(frozen=True)
class Begun:
    """What has been checked and chosen; no weights yet."""

    config: Config
    checked: Checked
    parallel: Parallel
    choice: Choice
    start: Pretrained | None = None


def check_alone(config: Config, env: Env) -> Checked:
    """Check all that a rank can check without the others.

    Raises:
        UsageError: as `execute` does.
    """
    place = pick_device(config.device, env.local_rank, config.parallel.share_gpu)
    kept = partial(resume.tokenizer, config, env)
    checked = check(config, env.world, env.rank, place.type, tokenizer=kept)
    check_launched(config, env.launched)
    corpus = with_validation(config, checked.corpus)
    check_val(corpus, config.model.context, config.data.val_tokens)
    return replace(checked, corpus=corpus)


def begin(config: Config, checked: Checked, parallel: Parallel, lock: Lock) -> Begun:
    """Compare the ranks, and choose a checkpoint. Nothing is written.

    lock: takes the run folder, if there is one.

    Raises:
        UsageError: as `execute` does.
    """
    check_alike(parallel, flat(plain(asdict(config))), checked.corpus.facts)
    choice = resume.choose(config, checked.corpus.facts, parallel, lock)
    start = None
    if choice.path is None and config.model.init_from:
        start = pretrained.open_alike(config.model.init_from, checked.model, parallel)
    return Begun(config, checked, parallel, choice, start)


def assemble(begun: Begun, callbacks: Sequence[Callback]) -> Trainer:
    """Build the run, and load what was chosen: a trainer that is ready to step.

    Raises:
        UsageError: the checkpoint does not fit.
        OutOfMemory: on each rank that has no more.
    """
    config, parallel, checked = begun.config, begun.parallel, begun.checked
    model, routing = checked.model, checked.routing
    plan = planning.plan_ahead(config, model, routing, parallel.env.world)
    memory = fitting.fit(config, model, routing, plan, parallel)
    batches = replace(checked.batches, micro=memory.micro_batch)
    parallel.loss_chunks = memory.loss_chunks
    with explained(config, memory, parallel.env.rank, "building the model"):
        run = build.build(config, parallel, checked.corpus, batches, model, routing, begun.start)
    run.predicted = memory
    trainer = Trainer(run, Path(config.output) / config.name, callbacks)
    if any(isinstance(rule, Baseline) for rule in routing.rules.values()):
        trainer.callbacks = [Curvature(), *trainer.callbacks]
    trainer.health.restore = partial(resume.take, trainer)
    resume.take_choice(trainer, begun.choice)
    return trainer


def prepare(config: Config, env: Env, callbacks: Sequence[Callback]) -> tuple[Trainer, Choice]:
    """Check, begin and assemble a run for a caller that steps it and writes nothing.

    Raises:
        UsageError: as `execute` does.
    """
    lock = Lock()
    try:
        checked = check_alone(config, env)
        parallel = start(config.parallel, config.device, env)
        begun = begin(config, checked, parallel, lock)
        return assemble(begun, callbacks), begun.choice
    finally:
        lock.release()


def _say_finished(begun: Begun) -> None:
    if begun.parallel.env.main:
        steps = begun.choice.facts["step"]
        print(
            f"geon: the run in {Path(begun.config.output) / begun.config.name} is finished at step "
            f"{steps}: nothing was trained, evaluated or written. A larger schedule.steps goes on; "
            "another name, or checkpoint.resume=never, starts anew",
            flush=True,
        )


def _callbacks(config: Config) -> list[Callback]:
    saved = config.checkpoint
    checkpointer = Checkpointer(saved.every, saved.keep, saved.background)
    preemption = Preemption(checkpointer)
    evaluator = Evaluator(config.eval.every, preemption)
    callbacks: list[Callback] = [
        FirstStep(),
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
    if config.logger.certify_every:
        callbacks.insert(1, Certify(config.logger.certify_every))
    if config.optim.record_pairs:
        callbacks.append(RecordPairs(config.optim.record_pairs))
    return callbacks
