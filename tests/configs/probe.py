"""What a config does, seen from outside: its plan, weights, steps, data, rates and read keys."""

import copy
import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from geon.configs.choices import Layouts, Task
from geon.configs.effects import check_launcher, unread
from geon.configs.ranges import rules
from geon.configs.schema import Config
from geon.data.corpus import Corpus
from geon.engine import build
from geon.engine.checks import check, check_launched
from geon.engine.evaluate import val_windows
from geon.engine.fitting import choose, planned_bytes
from geon.engine.images import check_task
from geon.engine.parallel import planned_layouts
from geon.engine.planning import plan_ahead, plan_facts
from geon.engine.schedule import fraction, own_fractions, progress
from geon.engine.sharding import planned_device
from geon.errors import UsageError
from geon.optim import HybridOptimizer, Rule, on_manifold
from geon.optim.health import Watch
from tests.configs.typed import at, changed, composed, leaves, others, read

# What is looked at. Each is remembered by the parts of a config that it is made of.


def digest(*tensors: Any) -> str:
    """Hash of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(np.ascontiguousarray(tensor.detach().float().numpy()).tobytes())
    return found.hexdigest()[:16]


_kept: dict[str, Any] = {}


def kept(make: Any, *parts: Any) -> Any:
    """Result of make(), remembered by the parts; a UsageError is as well."""
    key = repr((make.__name__, parts))
    if key not in _kept:
        try:
            _kept[key] = make()
        except UsageError as error:
            _kept[key] = error
    if isinstance(_kept[key], UsageError):
        raise _kept[key]
    return _kept[key]


def corpus_of(config: Config) -> Corpus:
    """The data."""

    def corpus() -> Corpus:
        return build.make_corpus(config.data, config.seed)

    ignored = replace(config.data, batch_tokens=0, micro_batch=0, val_tokens=0, shuffle=True)
    return kept(corpus, ignored, config.seed)


def counted(config: Config) -> Config:
    """With the ids of the data where the config says 0."""
    if not config.data.vocab_size:
        config = copy.deepcopy(config)
        config.data.vocab_size = corpus_of(config).vocab_size
        config.model.vocab_size = config.model.vocab_size or config.data.vocab_size
    return config


def model_of(config: Config) -> Any:
    """The model on the meta device."""

    def meta() -> Any:
        return build.make_model(config.model)

    return kept(meta, config.model)


def weights(config: Config) -> Any:
    """Initial weights of a model and its loss on the first windows."""

    def started() -> Any:
        model = build.make_model(config.model).to_empty(device="cpu")
        build.initialise(model, build.make_routing(model, config.optim), config.seed)
        generator = torch.Generator().manual_seed(0)
        shape = (2, min(config.model.context, 64))
        tokens = torch.randint(min(64, config.model.vocab_size), shape, generator=generator)
        if config.task.value == "image":
            tokens = torch.rand(2, 3, 32, 32, generator=generator)
        told = [(i.name, i.shape, i.role, model.rate_scale(i)) for i in model.infos]
        with torch.no_grad():
            params = list(model.parameters())
            for i, p in enumerate(params):  # zeros hide what is multiplied by them
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            return told, digest(*params), digest(model.unembed(model.hidden(tokens)))

    return kept(started, config.model, config.optim, config.seed, config.task)


def steps(config: Config) -> Any:
    """Weights after three steps on drawn gradients, by route; what is typed of each route."""
    model = model_of(config)
    routing = build.make_routing(model, config.optim)
    found = {}
    for name, route in routing.configs.items():
        members = [info.name for info in routing.members(name)]

        def stepped(name: str = name) -> str:
            own = build.make_model(config.model).to_empty(device="cpu")
            build.initialise(own, routing, 0)
            params = dict(own.named_parameters())
            group = [g for g in routing.groups(params) if g.name == name]
            optimizer = HybridOptimizer(
                group,
                max_norm=config.optim.max_norm,
                momentum=getattr(torch, build.MOMENTA[config.optim.momentum_dtype]),
                watch=Watch(False, 0.0),
            )
            drawn = torch.Generator().manual_seed(1)
            for turn in range(3):
                for i, (info, param) in enumerate(group[0].params):
                    gradient = torch.randn(info.shape, generator=drawn)
                    param.grad = None if turn == 1 and i == 0 else gradient
                optimizer.step()
            rule, per_head = routing.rules[name], routing.configs[name].per_head
            large = [
                on_manifold(info, 9 * torch.randn(info.shape, generator=drawn), rule, per_head)
                for info, _ in group[0].params
                if isinstance(rule, Rule)
            ]
            return digest(*[p for _, p in group[0].params], *large)

        o = config.optim
        parts = route, o.polar, o.solver, o.max_norm, o.momentum_dtype
        found[name] = kept(stepped, config.model, members, parts), members
    return found


def world_of(config: Config) -> int:
    """Ranks that a config is planned for here."""
    return config.plan.world_size or (1 if config.parallel.layout is Layouts.single else 4)


def planned(config: Config) -> Any:
    """What mode=plan says, of the model and of a larger one: small ones are not sent."""

    def plan() -> Any:
        model = model_of(config)
        routing = build.make_routing(model, config.optim)
        exchanged = plan_ahead(config, model, routing, world_of(config))
        kind = planned_device(config)
        room = planned_bytes(config, kind) if config.plan.memory_gb else 1e9
        memory = choose(config, model, routing, exchanged, world_of(config), kind, room)
        return repr(plan_facts(model, routing, exchanged, memory))

    def exchanged() -> Any:
        layers = 6 if config.task is Task.image else 2
        large = replace(config.model, d_model=1024, n_layer=layers)
        routing = build.make_routing(model := build.make_model(large), config.optim)
        found = plan_ahead(config, model, routing, world_of(config))
        layouts = planned_layouts(model, config.parallel, world_of(config))
        return repr((found.to_dict(), found.digest, layouts))

    def slow() -> Any:
        return exchanged()

    parts = (c := config).model, c.optim, c.parallel, c.shard, c.device
    told = kept(plan, *parts, c.data, c.plan, c.eval, c.task)
    large = kept(exchanged, *parts, c.plan.world_size)
    config = replace(config, shard=replace(config.shard, tflops=config.shard.tflops or 1e-3))
    return told, large, kept(slow, *parts, c.plan.world_size)


def read_first(config: Config) -> Any:
    """Facts of the data, and the first windows that are read."""
    corpus = corpus_of(config)
    batches = build.make_batches(config, corpus, 0, 1)
    if corpus.stream is not None:
        return corpus.facts, repr(batches)
    first = [digest(batches.windows_at(step)) for step in (0, 1)]
    seen = val_windows(corpus, config.model.context, config.data.val_tokens)
    return corpus.facts, seen, batches.micro, first


def rates(config: Config) -> Any:
    """Rates along the run: by steps, and by the clock at a second each."""
    schedule, found = config.schedule, []
    for step in range(16):
        at = progress(schedule, schedule.steps * step // 16, 0.1 * step)
        found.append((fraction(schedule, at), own_fractions(schedule, rules(config), at)))
    return schedule.steps, found


def accept(config: Config) -> Config:
    """A config that has passed all checks, with the ids of its data.

    Raises:
        UsageError: it has not.
    """
    world = world_of(config)

    def checked() -> Config:
        check_task(config, world)
        found = counted(config)
        check(copy.deepcopy(found), world, corpus=corpus_of(found))
        check_launched(found, True)
        return found

    return kept(checked, config)


def differ(one: Config, other: Config, key: str) -> bool:
    """Whether two accepted configs that differ in a key make different runs, as seen here."""
    of_group = {
        "model": (weights, read_first, planned),
        "optim": (steps, rates, weights),
        "data": (read_first, planned),
        "seed": (weights,),
        "schedule": (rates,),
    }
    looks = of_group.get(key.split(".")[0], (planned,))
    return any(look(one) != look(other) for look in looks)


@dataclass(frozen=True)
class Outcome:
    """What became of a key beside some options: refused, effect, ignored, or no value."""

    key: str
    word: str
    told: str = ""


def outcomes(chosen: dict[str, str], keep: Any = lambda key: True, **more: Any) -> list[Outcome]:
    """Set every key in turn beside the chosen options, and look.

    more: values that all share, dots written as two underscores.
    """
    raw = composed(**chosen)
    for key, value in more.items():
        *path, word = key.split("__")
        at(raw, ".".join(path))[word] = value if path else raw.__setitem__(word, value)
    config = read(raw)
    own, found = accept(config), []
    for key, kind in leaves():
        if not keep(key):
            continue
        words, told = ["no value"], ""
        for value in others(key, kind, at(config, key)):
            try:
                check_launcher(key, f"{key}={value}", "train")
                one = changed(config, raw, key, value)
                if reason := unread(one, key, raw):
                    raise UsageError(reason)
                words.append("effect" if differ(accept(one), own, key) else "ignored")
                told = f"{key}={value}"
            except UsageError as error:
                words.append("refused")
                told = told or f"{key}={value}: {error}"
            if words[-1] == "effect":
                break
        order = ("effect", "ignored", "refused", "no value")
        found.append(Outcome(key, next(word for word in order if word in words), told))
    return found
