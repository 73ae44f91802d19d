"""From what a run goes on: the checkpoint, what may have changed since, and loading it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from geon.configs.changes import Change, Kind, plain
from geon.configs.schema import Config
from geon.engine import checkpoint, history, integrity, runfolder, streaming, writing
from geon.engine.agreement import on_main
from geon.engine.differences import compare
from geon.engine.history import History, Segment
from geon.engine.lock import Lock
from geon.engine.parallel import Parallel
from geon.engine.schedule import progress
from geon.engine.trainer import Trainer
from geon.errors import UsageError
from geon.launch.env import Env


@dataclass(frozen=True)
class Choice:
    """What a run starts from.

    Attributes:
        path: checkpoint to load; None for fresh weights.
        facts: its commit file.
        run, segment: id of the run, and number of the segment that this start opens.
        continues: whether the run folder goes on as the same run.
        changed: settings that are others than the checkpoint's.
        finished: whether there is nothing to do.
        said: lines for people.
    """

    path: Path | None
    facts: dict[str, Any]
    run: str
    segment: int
    continues: bool
    changed: list[Change] = field(default_factory=list)
    finished: bool = False
    said: list[str] = field(default_factory=list)

    @property
    def origin(self) -> dict[str, Any] | None:
        """The checkpoint as the history tells it."""
        if self.path is None:
            return None
        found = {key: self.facts.get(key) for key in ("run", "segment", "step")}
        return {"path": str(self.path.absolute()), **found}


def choose(config: Config, data: Mapping[str, Any], parallel: Parallel, lock: Lock) -> Choice:
    """Choose a checkpoint on the main rank, for all; every rank must call.

    Nothing is written but the lock, if there is a run folder.

    data: facts of the corpus.

    Raises:
        UsageError: on every rank: the folder is in use, there is no such checkpoint, or what may
            not change has changed.
    """
    folder = Path(config.output) / config.name
    choice = on_main(parallel, lambda: _choose(config, folder, data, parallel.env, lock))
    if parallel.env.main:
        for line in choice.said:
            print(line, flush=True)
    _check_seen(choice, parallel)
    return choice


def tokenizer(config: Config, env: Env) -> str | None:
    """Serialised tokenizer of the checkpoint that the run will go on from, if it is to be kept.

    It reads one small file, before there is a process group.
    """
    offers = _offers(config, Path(config.output) / config.name, env)[0]
    facts = next((found for path in offers if (found := _facts(path))), None)
    if facts is None:
        return None
    codec, wanted = facts.get("codec"), config.data.bpe_vocab
    there = (facts.get("settings") or {}).get("data", {})
    if there.get("tokenizer") or config.data.tokenizer:  # which says what it is by itself
        return None
    saved = there.get("bpe_vocab")
    kept = saved == wanted if saved is not None else (codec == "bytes") is (wanted == 0)
    return codec if kept else None


def _choose(config: Config, folder: Path, data: Mapping[str, Any], env: Env, lock: Lock) -> Choice:
    said = []
    if folder.is_dir() and (line := lock.take(folder)):
        said.append(line)
    if config.checkpoint.resume != "never" or history.read(folder).opened_by(env):
        said += writing.recover(folder / "checkpoints")
    offers, continues, fall_back = _offers(config, folder, env)
    path, lines = _newest_sound(offers, fall_back)
    past = history.read(folder) if continues else History(folder)
    run = past.run or history.new_id()
    if path is None:
        return Choice(None, {}, run, past.next, continues, said=said + lines)
    facts = checkpoint.read_commit(path)
    done = progress(config.schedule, facts["step"], facts["elapsed"]) >= 1.0
    changed, more = compare(config, path, facts, data, done)
    report = runfolder.read_report(folder) or {}
    same = report.get("steps") == facts["step"] and report.get("run", past.run) == past.run
    finished = continues and done and same
    said += lines + more
    return Choice(path, facts, run, past.next, continues, changed, finished, said)


def _offers(config: Config, folder: Path, env: Env) -> tuple[list[Path], bool, bool]:
    """Checkpoints to start from, newest first.

    What an earlier attempt of this job opened goes on whatever the job was told: it was told so at
    its first attempt. So does a run that began at the checkpoint which is named, elsewhere: the
    same command once more would otherwise lose what it has trained.

    Returns: them, whether the folder goes on as the same run, and whether an older one may stand
        in for one that is damaged.

    Raises:
        UsageError: no checkpoint where one was named, or one that was gone back behind.
    """
    past, wish = history.read(folder), config.checkpoint.resume
    again = past.opened_by(env) or _began_at(past, wish)
    if not again and wish == "never":
        return [], False, False
    if again or wish == "auto":
        found = _candidates(folder, past)
        origin = again[-1].origin if again else None
        if origin is not None and _folder_of(Path(origin["path"])) != folder.resolve():
            found.append(Path(origin["path"]))
        return found, bool(again or found), True
    place = Path(wish).expanduser()
    home = _folder_of(place)
    inside = home == folder.resolve()
    if inside and place.resolve().parent.name.startswith("branch-"):
        raise UsageError(
            f"checkpoint.resume '{wish}' was gone back behind in this run: give what goes on from "
            "it another name"
        )
    found = _candidates(place, past if inside else history.read(home))
    if not found:
        raise UsageError(
            f"checkpoint.resume '{wish}' holds no committed checkpoint "
            "(expected a run folder, or auto, or never)"
        )
    return found, inside, False


def _began_at(past: History, wish: str) -> list[Segment]:
    """The first segment of a run, if it began at a place that is not its own folder."""
    first = min(past.segments, key=lambda one: one.number, default=None)
    if first is None or first.origin is None or wish in ("auto", "never"):
        return []
    path, place = Path(first.origin["path"]).resolve(), Path(wish).expanduser().resolve()
    home = _folder_of(path)
    elsewhere = home != past.folder.resolve()
    return [first] if elsewhere and place in (path, path.parent, home) else []


def _folder_of(place: Path) -> Path:
    """Run folder that a checkpoint, a checkpoints folder or a run folder is in."""
    place = place.resolve()
    for folder in (place, *place.parents[:3]):
        if (folder / history.RUN).is_file() or (folder / "checkpoints").is_dir():
            return folder
    return place


def _candidates(place: Path, past: History) -> list[Path]:
    """Checkpoints of a place, newest first; in a folder, those that its run is made of now."""
    found = checkpoint.candidates(place)
    if found == [place]:
        return found
    every = [(path, _facts(path)) for path in found]
    kept = [path for path, facts in every if facts is None or past.on_line(facts)]
    if found and not kept:
        raise UsageError(
            f"'{place}' holds checkpoints, such as '{found[0]}', and none from which "
            f"{history.HISTORY} says that the run goes on: name one by checkpoint.resume=PATH, or "
            "start anew by checkpoint.resume=never"
        )
    return kept


def _facts(path: Path) -> dict[str, Any] | None:
    """Commit file of a checkpoint; None if it cannot be read."""
    try:
        return checkpoint.read_commit(path)
    except UsageError:
        return None


def _newest_sound(offers: list[Path], fall_back: bool) -> tuple[Path | None, list[str]]:
    """The first of some checkpoints that is sound, and a line on each before it.

    Every byte of it is read, and of those that are refused.

    fall_back: whether a later one may stand in for the first.

    Raises:
        UsageError: none is sound, or the first is not; says why.
    """
    lines: list[str] = []
    for path in offers if fall_back else offers[:1]:
        try:
            facts = integrity.check(path)
        except integrity.Refused as error:
            lines.append(f"refused checkpoint {path}: {error}")
            continue
        if facts["files"] is None:
            lines.append(f"{path} is of format {facts['format']}, without digests: not verified")
        return path, lines
    if lines and fall_back:
        raise UsageError(
            f"there are checkpoints, and none can be used: {'; '.join(lines)}. Restore one, or "
            "start anew by checkpoint.resume=never"
        )
    if lines:
        others = f"; or name another one, such as '{offers[1]}'" if offers[1:] else ""
        raise UsageError(f"{lines[0]}. Restore it{others}")
    return None, lines


def _check_seen(choice: Choice, parallel: Parallel) -> None:
    """Refuse a checkpoint that a rank does not see as the main rank does.

    Raises:
        UsageError: on every rank; names the rank.
    """
    error = None
    try:
        if choice.path and checkpoint.read_commit(choice.path) != choice.facts:
            error = f"'{choice.path}' is another checkpoint"
    except UsageError as caught:
        error = str(caught)
    for rank, told in enumerate(parallel.gather(error)):
        if told:
            raise UsageError(
                f"rank {rank}: {told}; checkpoints must lie where all ranks see the same files"
            )


def take(trainer: Trainer, path: Path, project: bool = False) -> None:
    """Load a checkpoint into a trainer; every rank must call.

    project: bring weights to the manifolds of the rules.

    Raises:
        UsageError: tensors of another model or optimizer, or weights far from their manifold.
    """
    run = trainer.run
    facts = checkpoint.read_commit(path)
    checkpoint.begin_state(path, facts, run.optimizer)
    weights, state = run.tensors()
    checkpoint.load(path, weights, state, run.parallel)
    if run.parallel.backend is not None:
        run.parallel.backend.load(weights, state)
    if project:
        run.optimizer.project_()
    try:
        run.optimizer.check_on_manifold()
    except UsageError as error:
        reason = str(error).split(". Bring it there by")[0]
        raise UsageError(
            f"'{path}': {reason}. With other rules than the checkpoint's, checkpoint.project=true "
            "brings weights there"
        ) from None
    trainer.health.load(facts, run.optimizer)
    trainer.step, trainer.elapsed = facts["step"], facts["elapsed"]
    trainer.tokens = facts["tokens"] or trainer.step * run.config.data.batch_tokens
    context = run.config.model.context
    begin = trainer.step, trainer.tokens // context
    trainer.read_from(streaming.resumed(replace(run.batches, begin=begin), path, facts))
    if run.parallel.env.main:
        print(f"resuming from {path} at step {trainer.step}", flush=True)


def take_choice(trainer: Trainer, choice: Choice) -> None:
    """Make a trainer what was chosen; every rank must call.

    Raises:
        UsageError: as `take` does.
    """
    settings = plain(asdict(trainer.run.config))
    trainer.facts |= {"run": choice.run, "segment": choice.segment, "settings": settings}
    if choice.path is None:
        return
    wish = trainer.run.config.checkpoint.project
    moved = any(c.key.startswith("optim.") and c.kind is Kind.refused for c in choice.changed)
    if wish and not moved and trainer.run.parallel.env.main:
        print("checkpoint.project: the rules are the checkpoint's, nothing is moved", flush=True)
    if wish and moved and trainer.run.parallel.backend is not None:
        raise UsageError(
            "checkpoint.project=true with parallel=deepspeed, which keeps copies of the weights: "
            "take a first step by parallel=fsdp or ddp, and go on from its checkpoint"
        )
    take(trainer, choice.path, wish and moved)
