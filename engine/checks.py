"""What can be refused before there is a device, a process group or a run folder.

Training, `mode=plan` and the launchers ask the same questions, so that a job which must fail is
found before it is queued.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from geon.configs.changes import check_allowed, flat, plain
from geon.configs.choices import Layouts, Mode, Source
from geon.configs.schema import Config
from geon.data import Batches, Corpus, Split
from geon.engine import build
from geon.engine.backends import check_deepspeed
from geon.engine.evaluate import check_val
from geon.engine.health import check_health
from geon.engine.images import check_task
from geon.engine.loggers import check_loggers
from geon.engine.parallel import check_layout
from geon.engine.planning import check_exchange
from geon.engine.sharding import make_sharding, planned_device
from geon.errors import UsageError, shown
from geon.models import LanguageModel
from geon.optim.routing import Routing


@dataclass(frozen=True)
class Checked:
    """What the checks had to make, for the run that follows."""

    corpus: Corpus
    batches: Batches
    model: LanguageModel
    routing: Routing


def check(
    config: Config,
    world: int,
    rank: int = 0,
    kind: str = "",
    corpus: Corpus | None = None,
    tokenizer: Callable[[], str | None] = lambda: None,
) -> Checked:
    """Check a config against its data, its ranks and its model.

    kind: of device (cpu, cuda) that computes; empty takes the one that is planned for.
    corpus: the data, where it has been read before.
    tokenizer: gives the serialised one that data are to be read by, if there is one already.

    Raises:
        UsageError: the first thing that cannot work, by its keys.
    """
    check_layout(config.parallel, config.model, world)
    check_task(config, world)
    check_loggers(config.logger)
    check_allowed(config.checkpoint.allow_change, flat(plain(asdict(config))))
    check_output(config)
    corpus = corpus or count_ids(config, tokenizer)
    check_ids(config)
    make_sharding(config)
    model = build.make_model(config.model)
    half = build.native_half(config, kind or planned_device(config))
    routing = build.make_routing(model, config.optim, half)
    build.check_cuts(routing, config.parallel)
    check_deepspeed(config, routing)
    check_health(config, routing)
    check_exchange(config, model, routing, world)
    corpus = corpus or _read_data(config, tokenizer())
    check_samples(config, corpus)
    batches = build.make_batches(config, corpus, rank, world)
    if corpus.stream is None:  # a stream's is read by the run alone: it may take a while
        check_val(corpus, config.model.context, config.data.val_tokens)
    return Checked(corpus, batches, model, routing)


def count_ids(config: Config, tokenizer: Callable[[], str | None] = lambda: None) -> Corpus | None:
    """Replace a data.vocab_size of 0, and a model.vocab_size that follows it, by the data's.

    Returns: the data, where they had to be read for it.

    Raises:
        UsageError: missing or bad data.
    """
    if config.data.vocab_size:
        return None
    corpus = _read_data(config, tokenizer())
    config.data.vocab_size = corpus.vocab_size
    config.model.vocab_size = config.model.vocab_size or corpus.vocab_size
    return corpus


def absent(config: Config) -> Corpus | None:
    """For a plan: zeros in place of shards that are not there yet, where their ids are counted.

    Returns: None where there are some, or where the vocabulary has to come from them.
    """
    data = config.data
    if data.source is not Source.bins or not data.vocab_size or not data.dir:
        return None
    if Path(data.dir).expanduser().exists():
        return None
    splits = [
        Split(f"{what} tokens of {data.dir}", [np.zeros(tokens + config.model.context, np.uint16)])
        for what, tokens in (("training", data.batch_tokens), ("validation", data.val_tokens + 1))
    ]
    return Corpus(*splits, data.vocab_size, None, b"", {"name": data.dir})


def _read_data(config: Config, codec: str | None = None) -> Corpus:
    try:
        corpus = build.make_corpus(config.data, config.seed, codec)
    except (OSError, MemoryError, OverflowError) as error:
        raise UsageError(f"data={config.data.source.value} cannot be read: {error}") from None
    return corpus


def check_launched(config: Config, launched: bool) -> None:
    """Refuse a layout that needs a process group where no launcher started this process.

    Raises:
        UsageError: names the launchers.
    """
    if config.parallel.layout is Layouts.deepspeed and not launched:
        raise UsageError(
            "parallel=deepspeed needs a process group, on one rank too: start train.py with "
            "torchrun or deepspeed, or choose parallel=single"
        )


def check_ids(config: Config) -> None:
    """Refuse a model with fewer ids than its data: a look-up beyond a table has no message.

    Raises:
        UsageError: names both keys.
    """
    if config.model.vocab_size < config.data.vocab_size:
        raise UsageError(
            f"model.vocab_size {config.model.vocab_size} is below data.vocab_size "
            f"{config.data.vocab_size}: leave it out, and it follows the data, or make it larger"
        )


def check_samples(config: Config, corpus: Corpus) -> None:
    """Refuse a sample of shards whose tokenizer is not there.

    Raises:
        UsageError: names the key.
    """
    unknown = config.data.source in (Source.bins, Source.mix) and corpus.codec is None
    if config.eval.sample_tokens and unknown:
        why = corpus.facts.get("no text", "no meta.json with a tokenizer lies beside the shards")
        raise UsageError(
            f"eval.sample_tokens {config.eval.sample_tokens}: the text of these ids is not known, "
            f"because {why}; set eval.sample_tokens=0, or bring the tokenizer"
        )


def check_output(config: Config) -> None:
    """Refuse an output folder that cannot be made or written to. Nothing is made.

    Raises:
        UsageError: names what stands in the way.
    """
    folder = Path(config.output) / config.name
    told = f"output '{shown(config.output)}' with name '{shown(config.name)}'"
    try:
        os.fsencode(folder)
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not there.is_dir():
            raise UsageError(f"{told}: '{shown(str(there))}' is a file, a folder is needed")
        if config.mode is Mode.train and not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"{told}: '{shown(str(there))}' cannot be written to")
        if config.mode is Mode.train:
            with TemporaryFile(dir=there):  # without a name: nothing is left, nothing is seen
                pass
        longest = os.pathconf(there, "PC_NAME_MAX")
    except (OSError, UnicodeError, RuntimeError) as error:
        raise UsageError(f"{told} cannot be used: {error}") from None
    if any(len(os.fsencode(part)) > longest for part in folder.parts):
        raise UsageError(f"{told}: a folder's name there has at most {longest} bytes")
