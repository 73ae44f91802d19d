"""From config nodes to objects: the only place that instantiates them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.distributed.device_mesh import DeviceMesh

from geon.configs.choices import Init, MomentumDtype
from geon.configs.recipes import OptimConfig
from geon.configs.schema import (
    Config,
    DataConfig,
    Layouts,
    ModelConfig,
    ParallelConfig,
    Precision,
    Source,
)
from geon.data import (
    Batches,
    Corpus,
    cifar_corpus,
    glyph_corpus,
    load_codec,
    open_bins,
    stdlib_corpus,
    synthetic_corpus,
    text_corpus,
)
from geon.data.tokenizers import open_codec
from geon.engine import kept, sources
from geon.engine.devices import arithmetic
from geon.engine.parallel import Parallel, mesh_shape
from geon.engine.pretrained import Pretrained
from geon.engine.sharding import make_sharding
from geon.errors import UsageError
from geon.models import ARCHITECTURES, LanguageModel, Shape, shape_of
from geon.optim import (
    Block,
    EntryRule,
    HybridOptimizer,
    ParamInfo,
    Placement,
    Rule,
    block_scale,
    on_manifold,
)
from geon.optim.builder import told_moved
from geon.optim.health import Watch
from geon.optim.router import check_partition
from geon.optim.routing import Routing, route_by
from geon.optim.storage import lay

if TYPE_CHECKING:
    from geon.engine.memory import Prediction

MOMENTA = {MomentumDtype.fp32: "float32", MomentumDtype.bf16: "bfloat16"}
"""Names of torch's dtypes for the momentum."""


def make_corpus(config: DataConfig, seed: int, codec: str | None = None) -> Corpus:
    """Open the token source.

    codec: serialised tokenizer of the checkpoint that a run goes on from: data=text uses it
        rather than training one anew. The other sources have only one each, or none.

    Raises:
        UsageError: missing or bad data.
    """
    if config.source is Source.stdlib:
        corpus = stdlib_corpus(config.val_percent)
    elif config.source is Source.text:
        corpus = text_corpus(
            config.path,
            config.val_percent,
            config.bpe_vocab,
            load_codec(codec) if codec and not config.tokenizer else None,
            open_codec(config.tokenizer) if config.tokenizer else None,
            config.field,
            config.skip_undecodable,
        )
    elif config.source is Source.bins:
        corpus = open_bins(config.train, config.val, config.vocab_size, config.dir, config.dtype)
    elif config.source is Source.mix:
        corpus = sources.mixture(config, lambda part: make_corpus(part, seed, codec))
    elif config.source is Source.images:
        glyphs = not config.path
        corpus = (
            glyph_corpus(config.tokens, config.val_percent) if glyphs else cifar_corpus(config.path)
        )
    elif config.source is Source.stream:
        corpus = sources.stream(config, open_codec(config.tokenizer or "bytes"))
    else:
        corpus = synthetic_corpus(config.vocab_size, config.tokens, config.val_percent, seed)
    if config.vocab_size and corpus.vocab_size > config.vocab_size:
        raise UsageError(
            f"data.vocab_size {config.vocab_size} is below the {corpus.vocab_size} ids of "
            f"{corpus.facts['name']}: set data.vocab_size={corpus.vocab_size}, or "
            "0, which takes what there is"
        )
    if corpus.codec is not None and corpus.codec.token_bytes() is None:
        corpus.facts["no nats/byte"] = "this tokenizer does not give back exact bytes"
    return corpus


def make_shape(config: ModelConfig) -> Shape:
    """The sizes and options of an architecture.

    Raises:
        UsageError: names the key.
    """
    return shape_of(asdict(config))


def make_model(config: ModelConfig) -> LanguageModel:
    """Build the architecture on the meta device: shapes and roles, no memory."""
    shape = make_shape(config)
    with torch.device("meta"):
        return ARCHITECTURES[shape.arch](shape)


def make_routing(model: LanguageModel, config: OptimConfig, half: bool = False) -> Routing:
    """Assign every parameter of a model to a rule.

    half: take polar factors in bf16 where the config leaves it open, on a CPU too.

    Raises:
        UsageError: an unknown norm or manifold, a pair without a solver, a parameter no rule takes,
            heads for AdamW.
    """
    if half and config.polar.dtype == "auto":
        config = replace(config, polar=replace(config.polar, dtype="bf16"))
    return route_by(model.infos, config, model.rate_scale, model.modular)


def native_half(config: Config, device: str) -> bool:
    """Whether parallel.precision=native stands for bf16 on a kind of device."""
    native = config.parallel.precision is Precision.native
    return native and arithmetic(Precision.native, device) is torch.bfloat16


def check_cuts(routing: Routing, config: ParallelConfig) -> None:
    """Refuse rules that need whole parameters where parameters are cut.

    Raises:
        UsageError: names the route and the layout.
    """
    if config.layout in (Layouts.single, Layouts.ddp):
        return
    for name, rule in routing.rules.items():
        if isinstance(rule, EntryRule) and not rule.cuts:
            raise UsageError(
                f"optim.{name}.rule=baseline ('{routing.configs[name].baseline}') under "
                f"parallel.layout={config.layout.value}: other packages' optimizers need whole "
                "parameters; choose parallel=single or parallel=ddp"
            )


def make_batches(config: Config, corpus: Corpus, rank: int, world: int) -> Batches:
    """Cut the global batch over ranks and micro-batches; tensor ranks of a group read the same.

    Raises:
        UsageError: the batch does not divide; names the nearest one that does.
    """
    main = rank == 0
    tensor = mesh_shape(config.parallel, world).get("tensor", 1)
    rank, world = rank // tensor, world // tensor
    context, tokens = config.model.context, config.data.batch_tokens
    sequences, rest = divmod(tokens, context)
    micro = config.data.micro_batch or max(1, sequences // world)
    unit = context * world * micro
    if rest or sequences == 0 or sequences % (world * micro):
        nearby = max(1, round(tokens / unit)) * unit
        raise UsageError(
            f"data.batch_tokens {tokens} is not a multiple of {unit} = model.context {context} x "
            f"{world} ranks x data.micro_batch {micro}: the nearest that divides is {nearby}"
        )
    common = {
        "split": corpus.train,
        "context": context,
        "sequences": sequences,
        "rank": rank,
        "world": world,
        "micro": micro,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
    }
    return sources.batches(config, corpus, common, main)


def initialise(
    model: LanguageModel, routing: Routing, seed: int, start: Pretrained | None = None
) -> dict[str, float]:
    """Set every weight: a function of (seed, name, shape), whatever the number of ranks.

    Each rank draws the whole parameter, brings it to its rule's sphere or manifold, and keeps its
    region; one whole parameter is in memory at a time.

    start: gives weights in place of the drawn ones.

    Returns: how far each of those that has a manifold was moved, over its length.
    """
    moved = {}
    params = dict(model.named_parameters())
    for info in routing.infos:
        digest = hashlib.sha256(f"{seed}/{info.name}".encode()).digest()
        generator = Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rule, config = routing.rule(info), routing.configs[routing.assigned[info.name]]
        if start is not None:
            given = start.weight(info)
            whole = on_manifold(info, given, rule, config.per_head)
            if isinstance(rule, Rule) and rule.manifold.constrains:
                moved[info.name] = float((whole - given).norm() / given.norm().clamp_min(1e-30))
            lay(whole, params[info.name])
            continue
        whole = model.initial(info, generator)
        if isinstance(rule, Rule):
            if config.init is Init.boundary and bool(whole.any()):
                whole = _at_boundary(info, routing.blocks(info), rule, generator)
            whole = on_manifold(info, whole, rule, config.per_head)
        lay(whole, params[info.name])
    return moved


def _at_boundary(
    info: ParamInfo, blocks: Sequence[Block], rule: Rule, generator: Generator
) -> Tensor:
    """Random weight: each block on the sphere of its rule's norm, at its scale."""
    drawn = torch.empty(info.matrix_shape)
    for block in blocks:
        matrices = [
            torch.stack([rule.norm.init(form.shape, generator) for _ in range(form.count)])
            * rule.radius
            * block_scale(rule, block)
            for form in block.forms
        ]
        drawn[block.slices] = block.view.close(matrices, block.box)[0]
    return drawn.view(info.shape)


def make_optimizer(
    model: LanguageModel,
    routing: Routing,
    config: Config,
    mesh: DeviceMesh | None = None,
    held: Mapping[str, Tensor] | None = None,
    placement: Placement | None = None,
) -> HybridOptimizer:
    """Build the optimizer over a placed model.

    held, placement: what a framework holds in place of the parameters, and how it lies.
    """
    params = held or dict(model.named_parameters())
    groups = routing.groups(params)
    check_partition(params, [[info.name for info, _ in group.params] for group in groups])
    return HybridOptimizer(
        groups,
        make_sharding(config),
        mesh,
        max_norm=config.optim.max_norm,
        momentum=getattr(torch, MOMENTA[config.optim.momentum_dtype]),
        nonfinite=config.optim.nonfinite.value,
        watch=Watch(config.health.updates, config.health.spike),
        placement=placement,
    )


def fingerprint(model: LanguageModel) -> Mapping[str, Any]:
    """Facts about a model that must agree for a checkpoint to fit."""
    return {"arch": model.arch, **asdict(model.shape)}


@dataclass
class Run:
    """Everything a trainer needs, built and checked; nothing written yet."""

    config: Config
    parallel: Parallel
    corpus: Corpus
    batches: Batches
    model: LanguageModel
    routing: Routing
    optimizer: HybridOptimizer
    predicted: "Prediction | None" = None
    """Memory that the run was predicted to hold; None where it was not asked."""

    def whole(self, name: str) -> Tensor:
        """A whole weight; gathers a sharded one, so every rank must call."""
        if self.parallel.backend is not None:
            return self.parallel.backend.weight(name)
        param: Any = self.model.get_parameter(name).detach()
        return param.full_tensor() if hasattr(param, "full_tensor") else param

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer state, as a checkpoint holds them: DTensors, or whole."""
        if self.parallel.backend is not None:
            return self.parallel.backend.tensors()
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        return weights, self.optimizer.state_tensors() | kept.tensors(self.optimizer)


def build(
    config: Config,
    parallel: Parallel,
    corpus: Corpus,
    batches: Batches,
    model: LanguageModel,
    routing: Routing,
    start: Pretrained | None = None,
) -> Run:
    """Place, initialise and wrap a model from the meta device, and build its optimizer.

    start: gives the first weights, instead of drawing them.
    """
    parallel.place(model)
    moved = initialise(model, routing, config.seed, start)
    if start is not None and parallel.env.main:
        far = told_moved(moved)
        print(f"weights of {start.folder}{f'; {far}' if far else ''}", flush=True)
    parallel.wrap(model)
    if config.parallel.layout is Layouts.deepspeed:
        from geon.engine.backends import DeepSpeed  # it makes an optimizer of its own

        half = parallel.dtype is torch.bfloat16
        sizes = batches.micro, batches.accumulation
        parallel.backend = DeepSpeed(config, model, routing, *sizes, half)
        optimizer = parallel.backend.optimizer
    else:
        optimizer = make_optimizer(model, routing, config, parallel.mesh)
    return Run(config, parallel, corpus, batches, model, routing, optimizer)
