"""When a key is read: one that is typed and not read is refused, because nothing is silent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from geon.configs.asked import Facts, facts
from geon.configs.choices import (
    Layouts,
    Mode,
    Policy,
    Precision,
    RuleKind,
    Shape,
    Source,
    Task,
    TransportChoice,
)
from geon.configs.overrides import flat
from geon.configs.ranges import rules
from geon.configs.recipes import RuleConfig
from geon.configs.schema import Config
from geon.errors import UsageError, shown

SHARDED = (Layouts.fsdp, Layouts.hsdp)
_WITHOUT_HEADS = ("optim.embedding", "optim.head", "optim.tied", "optim.rest")


@dataclass(frozen=True)
class When:
    """A condition of a glob of keys.

    Attributes:
        words: the condition, for people.
        read: whether it holds.
    """

    keys: str
    words: str
    read: Callable[[Config], bool]


def _source(*sources: Source) -> Callable[[Config], bool]:
    return lambda c: c.data.source in sources


def _reads(*sources: Source) -> Callable[[Config], bool]:
    """As `_source`, of any source of a mixture too."""
    return lambda c: (
        c.data.source in sources
        or c.data.source is Source.mix
        and any(part.source in sources for part in c.data.parts().values())
    )


def _split(config: Config) -> bool:
    data = config.data
    if data.source is Source.mix:
        return any(part.source is not Source.bins for part in data.parts().values())
    if data.source is Source.images and data.path:
        return False  # CIFAR-10's test images are its own
    return data.source is not Source.bins and not data.val_split


def _layout(*layouts: Layouts) -> Callable[[Config], bool]:
    return lambda c: c.parallel.layout in layouts


def _any_rule(test: Callable[[RuleConfig], bool]) -> Callable[[Config], bool]:
    return lambda c: any(test(rule) for place, rule in rules(c).items() if _has_members(c, place))


def _has_members(config: Config, place: str) -> bool:
    """Whether the model has parameters of a role; the globs of overrides are read in any case."""
    found, role = facts(config.model), place.removeprefix("optim.")
    if found is None or role not in ("embedding", "head", "tied", "rest"):
        return True
    if role == "rest":
        return bool(found.roles - {"embedding", "head", "tied", "hidden"})
    return role in found.roles


def _model(test: Callable[[Facts], bool]) -> Callable[[Config], bool]:
    """A condition of the model; one that cannot be made is refused later, with its reason."""
    return lambda c: (found := facts(c.model)) is None or test(found)


def _has(word: str) -> Callable[[Config], bool]:
    return _model(lambda found: word in found.fields)


def _globs(config: Config) -> bool:
    return config.data.source is Source.bins and not config.data.dir


def _text(config: Config) -> bool:
    return config.data.source not in (Source.synthetic, Source.images)


def _polar(rule: RuleConfig) -> bool:
    return _steepest(rule) and (
        rule.norm == "spectral" or rule.manifold not in ("euclidean", "oblique", "frobenius_sphere")
    )


def _iterates(config: Config) -> bool:
    """Whether a rule takes polar factors by the table: on stiefel, that is up to the solver."""
    solver = config.optim.solver
    by_gram = solver.form == "gram" or solver.form == "auto" and not _half(config)
    exactly = solver.method == "exact" or solver.method == "lgm" and by_gram
    return _any_rule(lambda rule: _polar(rule) and not (_ladder(rule) and exactly))(config)


def _half(config: Config) -> bool:
    """Whether products may be in bf16: device=auto may be a GPU."""
    asked = config.optim.polar.dtype == "bf16" or config.parallel.precision is Precision.native
    machine = config.shard.machine
    planned = config.device if machine == "auto" else machine
    return asked or config.optim.polar.dtype == "auto" and planned != "cpu"


def _steepest(rule: RuleConfig) -> bool:
    return rule.rule is RuleKind.steepest


def _exchanged(rule: RuleConfig) -> bool:
    """Whether a step needs more of a matrix than an entry: signs do not."""
    signs = rule.norm == "sign" and rule.manifold == "euclidean"
    rows = rule.second_moment or rule.even_rows or rule.finishes
    return _steepest(rule) and not (signs and not rows)


def _ladder(rule: RuleConfig) -> bool:
    return _steepest(rule) and rule.manifold in ("stiefel", "orthogonal")


WHEN = (
    When("data.path", "data=text or images", _source(Source.text, Source.images)),
    When("data.bpe_vocab", "data=text, without data.tokenizer",
         lambda c: c.data.source is Source.text and not c.data.tokenizer),
    When("data.skip_undecodable", "data=text", _reads(Source.text)),
    When("data.tokenizer", "data=text or stream", _reads(Source.text, Source.stream)),
    When("data.field", "data=text or stream", _reads(Source.text, Source.stream)),
    When("data.dir", "data=bins", _source(Source.bins)),
    When("data.train", "data=bins, without data.dir", _globs),
    When("data.val", "data=bins, without data.dir", _globs),
    When("data.dtype", "data=bins, without data.dir", _globs),
    When("data.tokens", "data=synthetic, or data=images without data.path",
         lambda c: c.data.source is Source.synthetic
         or c.data.source is Source.images and not c.data.path),
    When("data.val_percent", "a source that is split: not data=bins, no data.val_split", _split),
    *(When(f"data.{word}", "data=stream", _source(Source.stream))
      for word in ("dataset", "subset", "revision", "split", "val_split",
                   "streams", "workers")),
    When("data.buffer", "data=stream, and data.shuffle=true",
         lambda c: c.data.source is Source.stream and c.data.shuffle),
    When("data.mix*", "data=mix", _source(Source.mix)),
    When("model.n_head", "model.head_dim=0", lambda c: not c.model.head_dim),
    *(When(f"model.{word}", "task=text", lambda c: c.task is Task.text)
      for word in ("context", "softcap", "fused_qkv", "zero_init_proj", "mup")),
    *(When(f"model.{word}", "a model with attention: not model=mlp or conv",
           _model(lambda found: found.attends))
      for word in ("n_head", "head_dim")),
    When("model.mlp_ratio", "a model whose MLP has two matrices, as model=gpt", _has("mlp_ratio")),
    When("parallel.activation_checkpointing", "a model with blocks: not model=mlp or conv",
         _model(lambda found: found.blocks)),
    When("model.base_width", "model.mup=true", lambda c: c.model.mup),
    When("model.init_from", "a model that transformers has, as model=gpt or gpt2",
         _model(lambda found: found.stored)),
    When("model.zero_init_proj", "weights that are drawn: not model.init_from",
         lambda c: not c.model.init_from),
    When("optim.*.init", "weights that are drawn: not model.init_from",
         lambda c: not c.model.init_from),
    *(When(f"model.{word}", "an architecture that has it, as model=gpt", _has(word))
      for word in ("rope_base", "tied", "activation_scale", "gains", "residual", "norm")),
    When("parallel.replicas", "parallel=hsdp", _layout(Layouts.hsdp)),
    When("parallel.tensor", "parallel=fsdp or hsdp", _layout(*SHARDED)),
    When("parallel.long_side", "parallel=fsdp or hsdp", _layout(*SHARDED)),
    When("parallel.long_side", "a hidden matrix of more columns than rows: this model has none",
         _model(lambda found: found.wide)),
    When("parallel.loss_chunks", "task=text", lambda c: c.task is Task.text),
    When("parallel.zero", "parallel=deepspeed_z0 to z3", _layout(Layouts.deepspeed)),
    When("parallel.share_gpu", "several ranks on GPUs: not parallel=single or device=cpu",
         lambda c: c.parallel.layout is not Layouts.single and c.device != "cpu"),
    When("parallel.timeout_seconds", "several ranks: not parallel=single",
         lambda c: c.parallel.layout is not Layouts.single),
    When("schedule.steps", "schedule.tokens=0", lambda c: not c.schedule.tokens),
    When("schedule.decay", "schedule=linear", lambda c: c.schedule.shape is Shape.linear),
    When("schedule.floor", "schedule=linear or cosine",
         lambda c: c.schedule.shape is not Shape.constant),
    When("checkpoint.keep", "checkpoint.every above 0", lambda c: c.checkpoint.every > 0),
    When("checkpoint.allow_change", "a checkpoint to go on from: not checkpoint.resume=never",
         lambda c: c.checkpoint.resume != "never"),
    When("checkpoint.project", "checkpoint.allow_change",
         lambda c: bool(c.checkpoint.allow_change)),
    When("health.max_skips", "health.policy=skip", lambda c: c.health.policy is Policy.skip),
    When("health.max_rewinds", "health.policy=rewind",
         lambda c: c.health.policy is Policy.rewind),
    When("logger.wandb_*", "logger.wandb=true", lambda c: c.logger.wandb),
    When("eval.sample_tokens", "text: data=stdlib, text or bins", _text),
    When("eval.sample_prompt", "eval.sample_tokens above 0", lambda c: c.eval.sample_tokens > 0),
    When("eval.sample_temperature", "eval.sample_tokens above 0",
         lambda c: c.eval.sample_tokens > 0),
    When("shard.*", "several ranks: not parallel=single",
         lambda c: c.parallel.layout is not Layouts.single),
    When("shard.objective", "shard.transport=auto, and without shard.reproducible",
         lambda c: c.shard.transport is TransportChoice.auto and not c.shard.reproducible),
    When("plan.*", "mode=plan", lambda c: c.mode is Mode.plan),
    When("optim.polar.*", "a rule with the spectral norm", _any_rule(_polar)),
    *(When(f"optim.polar.{word}", "polar factors by a table: a rule off the manifold stiefel, or "
           "there optim.solver.method=oneshot or optim.solver.form=rect (auto: in bf16)", _iterates)
      for word in ("coefficients", "steps", "accuracy", "lower")),
    When("optim.polar.dtype", "polar factors: optim.solver.method=oneshot, published or lgm, and "
         "not optim.solver.form=gram",
         lambda c: _iterates(c) or (c.optim.solver.method, c.optim.solver.form) == ("lgm", "auto")),
    When("optim.polar.steps", "optim.polar.accuracy=0", lambda c: not c.optim.polar.accuracy),
    When("optim.polar.lower", "optim.polar.accuracy above 0",
         lambda c: c.optim.polar.accuracy > 0),
    When("optim.solver.*", "a rule on the manifold stiefel", _any_rule(_ladder)),
    When("optim.solver.refine", "optim.solver.method=lgm",
         lambda c: c.optim.solver.method == "lgm"),
    When("optim.solver.form", "optim.solver.method=lgm",
         lambda c: c.optim.solver.method == "lgm"),
    When("optim.solver.products", "optim.solver.method=oneshot, lgm or published",
         lambda c: c.optim.solver.method != "exact"),
    When("optim.momentum_dtype", "a steepest rule", _any_rule(_steepest)),
    When("optim.compile", "a steepest rule", _any_rule(_steepest)),
    *(When(key, "a steepest rule of hidden matrices",
           lambda c: any(_steepest(rule) for place, rule in rules(c).items()
                         if place == "optim.hidden" or place.startswith("optim.overrides.")))
      for key in ("optim.record_pairs", "optim.budget", "optim.lr_at.*")),
    When("logger.geometry_every", "a steepest rule", _any_rule(_steepest)),
    *(When(f"shard.{word}", "a steepest rule, whose matrices are exchanged: not of signs",
           _any_rule(_exchanged))
      for word in ("transport", "objective", "reproducible", "max_buffer_mb", "wire", "tflops",
                   "half_tflops", "gbytes", "latency_us")),
    When("shard.max_buffer_mb", "steps of many parameters at once: not parallel=deepspeed_z1 to z3",
         lambda c: c.parallel.layout is not Layouts.deepspeed or c.parallel.zero == 0),
    When("shard.half_tflops", "products in bf16: on a GPU, or optim.polar.dtype=bf16", _half),
    When("optim.max_norm", "a rule adamw or baseline", _any_rule(lambda rule: not _steepest(rule))),
)  # fmt: skip
"""The first line that fits a key and does not hold is the reason of the refusal. A key without a
line is read by every run."""

_ANY_RULE = "rule lr lr_scale cooldown"
RULE_READS = {
    RuleKind.adamw: f"{_ANY_RULE} weight_decay betas eps per_head idle pattern optional",
    RuleKind.adam_rows: f"{_ANY_RULE} weight_decay betas norm radius per_head idle pattern "
    "optional",
    RuleKind.baseline: f"{_ANY_RULE} baseline options per_head idle pattern optional",
    RuleKind.steepest: f"{_ANY_RULE} weight_decay norm manifold manifold_options momentum nesterov "
    "radius second_moment even_rows finishes idle spectral_scale per_head init pattern optional",
}
"""Words of a route that each kind of rule reads, or refuses itself where it is made."""

LAUNCHERS = {
    "train": "",
    "sweep": "sweep sweep.* cluster cluster.nodes cluster.ranks_per_node",
    "slurm": "cluster cluster.*",
}
"""Keys of sweep and cluster that are read, by what is started."""


def check_effects(
    config: Config,
    overrides: Sequence[Override],
    raw: Any,
    given: Callable[[], Any],
    program: str = "train",
) -> None:
    """Refuse typed keys that this run does not read, unless they say what holds anyway.

    raw: the composed config before references were resolved.
    given: composes what the chosen files say, without the typed keys.
    program: train, sweep or slurm.

    Raises:
        UsageError: names the key, its value and when it is read.
    """
    leaves: dict[str, Any] = {}
    for override in overrides:
        key, own = override.key_or_group, {}
        if not (override.is_delete() or override.is_sweep_override()):
            own = dict(flat(override.value(), key))
        for place in own or [key]:
            check_launcher(place, override.input_line or "", program)
        leaves |= own  # of a key that is typed twice, the last
    if program == "sweep":
        return  # its jobs are checked one by one
    for place, value in leaves.items():
        if (reason := unread(config, place, raw)) and not holds_anyway(given(), place, value):
            raise UsageError(
                f"{place}={shown(str(value))} has no effect{_beside(config, place)}: {place} is "
                f"read with {reason}; leave it out"
            )


def check_launcher(key: str, text: str, program: str) -> None:
    """Refuse a key of sweep or cluster that is read by another program than this one."""

    def reads(who: str) -> bool:
        return any(fnmatchcase(key, known) for known in LAUNCHERS[who].split())

    if key.split(".")[0] in ("sweep", "cluster") and not reads(program):
        who = " or ".join(f"geon.launch.{name}" for name in LAUNCHERS if reads(name))
        raise UsageError(f"{shown(text)} has no effect here: it is read by python -m {who}")


def unread(config: Config, key: str, raw: Mapping[str, Any]) -> str:
    """When a leaf is read, where this config does not read it; '' where it does."""
    if key == "optim.lr" and not _followed(config, raw):
        return "a rate that follows it (lr: ${optim.lr}), and every rate here is set by itself"
    if key.startswith("data.mix.") and config.data.source is Source.mix:
        name, _, word = key.removeprefix("data.mix.").partition(".")
        part = config.data.parts().get(name)
        if part is None or word in ("", "weight", "source"):
            return ""
        return unread(replace(config, data=part), f"data.{word}", raw).replace("data=", "source=")
    for when in WHEN:
        if fnmatchcase(key, when.keys) and not when.read(config):
            return when.words
    place, _, word = key.rpartition(".")
    for route, rule in rules(config).items():
        if key == route or f"{key}.".startswith(f"{route}."):
            if not _has_members(config, route):
                return "parameters of this role, and the model has none"
            word = key[len(route) + 1 :].split(".")[0]
            if word == "cooldown" and config.schedule.shape is not Shape.linear:
                return "schedule=linear"
            if word and word not in RULE_READS[rule.rule].split():
                kinds = [kind.value for kind, words in RULE_READS.items() if word in words.split()]
                return f"{route}.rule={' or '.join(kinds)}, not {rule.rule.value}"
            found = facts(config.model)
            headless = route in _WITHOUT_HEADS or (found is not None and not found.attends)
            if word == "per_head" and headless:
                return "parameters that have attention heads: of optim.hidden or optim.overrides"
            if rule.rule is not RuleKind.steepest:
                continue
            if word == "per_head" and not _exchanged(rule):
                return f"{route}.norm other than sign, whose steps are of entries"
            if word == "spectral_scale" and rule.norm != "spectral":
                return f"{route}.norm=spectral"
            if word == "nesterov" and not rule.momentum:
                return f"{route}.momentum above 0"
    return ""


def _followed(config: Config, raw: Mapping[str, Any]) -> bool:
    """Whether the rate of a route that has parameters refers to optim.lr."""
    for place in rules(config):
        node: Any = raw
        for part in place.split("."):
            node = (node or {}).get(part)
        if _has_members(config, place) and "optim.lr" in str((node or {}).get("lr")):
            return True
    return False


def _beside(config: Config, place: str) -> str:
    """What was chosen of the group that a key belongs to."""
    kind = {"data": "source", "parallel": "layout", "model": "arch", "schedule": "shape"}
    group = place.split(".")[0]
    if (word := kind.get(group)) is None:
        return ""
    return f" with {group}.{word}={getattr(getattr(config, group), word).value}"


def holds_anyway(given: Any, key: str, value: Any) -> bool:
    """Whether a value is the one that the chosen files have, which an unread key may say.

    given: what the files say, composed.
    """
    found = OmegaConf.select(given, key, throw_on_missing=False)
    if found is None or value is None:
        return found is value
    found = getattr(found, "value", found)
    return found == value or str(found).lower() == str(value).lower()
