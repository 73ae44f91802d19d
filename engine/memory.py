"""Bytes that a run will hold on a rank, known before anything is allocated.

A step passes through phases, and what is held in each is listed by part; the peak is the largest
phase, not the sum of all parts. Weights, gradients and optimizer state are exact, except that
a baseline's state is reckoned as two averages. Activations are what autograd saves
(tests/engine/test_memory.py counts it); what comes and goes inside of an operator is estimated.
torch keeps freed memory: a device's own figure may lie a little above.
"""

from dataclasses import dataclass
from typing import Any

import torch

from geon.configs.schema import Config, Layouts
from geon.engine.build import MOMENTA
from geon.engine.parallel import Parallel, mesh_shape, planned_layouts
from geon.engine.scratch import FP32, scratch_bytes
from geon.launch.env import Env
from geon.models import LanguageModel
from geon.models.kept import Pass
from geon.models.layers import composes
from geon.models.loss import block_rows
from geon.optim.routing import Routing
from geon.optim.shard import Plan, holding
from geon.optim.state import new_state

PHASES = ("loss", "head", "last block", "first block", "step", "evaluation")
"""End of the forward pass; backward through the head, the last and the first block; the optimizer's
step; an evaluation, which has a batch of its own (eval.batch)."""

_REDUCE_BUCKET = 2 * 10**7
"""Entries of DeepSpeed's buckets; see engine/backends.py."""


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes on the busiest rank.

    Attributes:
        phases: by phase (see PHASES), bytes by part.
        micro_batch: sequences in a forward pass.
        accumulation: forward passes in a step.
        loss_chunks: pieces that the logits are made in.
    """

    phases: dict[str, dict[str, int]]
    micro_batch: int
    accumulation: int
    loss_chunks: int

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes of the largest phase of a training step."""
        return max(total for phase, total in self.totals.items() if phase != "evaluation")

    def to_dict(self) -> dict[str, Any]:
        """The prediction in plain containers, for JSON."""
        return {
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "loss_chunks": self.loss_chunks,
            "peak_bytes": self.peak,
            "phases": self.phases,
        }

    def table(self) -> str:
        """Table in MiB: parts by phases of a step."""
        names = list(dict.fromkeys(part for parts in self.phases.values() for part in parts))
        rows = [(name, [p.get(name, 0) for p in self.phases.values()]) for name in names]
        rows = [row for row in rows if any(row[1])] + [("total", list(self.totals.values()))]
        head = f"{'MiB a rank, in phase':<22}" + "".join(f"{phase:>12}" for phase in self.phases)
        lines = [
            f"{name:<22}" + "".join(f"{size / 2**20:>12,.1f}" for size in sizes)
            for name, sizes in rows
        ]
        return "\n".join([head, *lines, self.summary()])

    def summary(self) -> str:
        """The peak, and the batch that it is of, in words."""
        text = (
            f"memory: {self.peak / 2**30:.2f} GiB predicted on the busiest rank, with "
            f"{self.accumulation} forward passes of {self.micro_batch} sequences a step"
        )
        chunks = self.loss_chunks
        return text + (f", logits in {chunks} pieces" if chunks > 1 else "")


@dataclass(frozen=True)
class _Case:
    """What the parts depend on besides the model's own sizes.

    Attributes:
        size: bytes of a number in the model's arithmetic.
        tensor: ranks of tensor parallelism.
        alone: whether the weights are whole, and autocast makes copies of them.
    """

    model: LanguageModel
    size: int
    tensor: int
    compiled: bool
    checkpointed: bool
    alone: bool
    kind: str

    @property
    def half(self) -> bool:
        """Whether the arithmetic is in bf16."""
        return self.size < FP32

    @property
    def gathers_logits(self) -> bool:
        """Whether tensor parallelism cuts the head; see LanguageModel.loss."""
        return self.tensor > 1 and "head" in self.model.tp_plan()


def predict(
    config: Config,
    model: LanguageModel,
    routing: Routing,
    plan: Plan,
    world: int,
    kind: str,
    micro: int,
    chunks: int = 1,
) -> Prediction:
    """Predict the bytes on the busiest of `world` ranks, for a device of a kind (cpu, cuda).

    micro: sequences in a forward pass. chunks: pieces of the logits.
    """
    parallel = Parallel(config.parallel, Env(world=world), torch.device(kind))
    sizes = mesh_shape(config.parallel, world)
    tensor, sharded = sizes.get("tensor", 1), "shard" in sizes and world > 1
    size = parallel.dtype.itemsize
    eager_cpu = kind == "cpu" and not parallel.compiles
    case = _Case(
        model,
        size,
        tensor,
        parallel.compiles,
        config.parallel.activation_checkpointing,
        not sharded and config.parallel.layout is not Layouts.deepspeed,
        kind,
    )
    context = config.model.context
    share = config.data.batch_tokens // context // (world // tensor)
    accumulation = max(1, share // micro)
    tokens = micro * context
    held = held_bytes(config, model, routing, world, size)
    numel = model.parameter_count() // tensor
    collected = held["gradients"]
    if sharded and accumulation > 1:
        # Without a reduction FSDP2 keeps gradients whole, in the dtype that they are reduced in.
        collected = numel * FP32
    kept = {
        "weights": held["weights"],
        "optimizer state": held["optimizer state"],
        # DDP copies gradients into buckets that live as long as it does (no bucket views).
        "gradient buckets": held["gradients"]
        * (config.parallel.layout is Layouts.ddp and world > 1),
        # The loader makes a step's micro-batches at once: inputs and targets, int64.
        "batch": 2 * 8 * share * context,
    }
    if config.parallel.layout is Layouts.deepspeed:
        kept["gradient buckets"] = 2 * _REDUCE_BUCKET * size
    earlier = collected * (accumulation > 1)
    root, unit = _units(model, tensor)
    gathered = (root + 2 * unit) * size if sharded else 0  # the one in use, and its neighbour
    composed = composes(kind, torch.bfloat16 if case.half else torch.float32, context)
    at = Pass(tokens, context, size, FP32 if eager_cpu else size, tensor, composed, eager_cpu)
    block = model.block_bytes(at)
    layers = model.shape.n_layer
    blocks = layers * (tokens * model.shape.d_model * size if case.checkpointed else block)
    outer = model.outer_bytes(at)
    copies = copied_bytes(model, size, case.compiled, case.checkpointed) * case.alone // tensor
    again = block if case.checkpointed else 0
    work, found, head = _backward(case, tokens)
    # FSDP2 reduces a unit from a whole fp32 copy, while the next block's gradients are made.
    spared = tokens * model.shape.d_model * size if case.checkpointed else block
    reducing = unit * size + max(0, unit * FP32 - spared) if sharded else 0
    training = {**kept, "gathered weights": gathered}
    logits, buffers = _loss(case, tokens, chunks, True)
    tail = {"activations": blocks + outer, "weight copies": copies}
    # Inside of the blocks the gradient of the head's input is gone.
    freed = tokens * model.shape.d_model * size
    last = {
        "activations": blocks + outer + again - freed,
        "weight copies": copies if not case.checkpointed else 0,
    }
    tied = any(info.role.value == "tied" for info in model.infos)
    # A tied weight's, or a later micro-batch's, gradient exists beside the one that it is added to.
    added = model.shape.vocab_size * model.shape.d_model * FP32 * (tied or accumulation > 1)
    added *= not sharded
    steps = scratch_bytes(config, routing, plan, model, world, kind)
    eval_tokens = config.eval.batch * context
    eval_logits, eval_buffers = _loss(case, eval_tokens, chunks, False)
    first = {
        **training,
        "gradients": held["gradients"],
        "activations": block + outer - freed,
        "buffers": work + added,
    }
    if sharded:
        first = _first_block(case, root, unit, accumulation, first, kept)
    phases = (
        {**training, "gradients": earlier, **tail, "logits": logits, "buffers": buffers},
        {**training, "gradients": earlier, **tail, "buffers": head},
        {**training, "gradients": max(earlier, found), **last, "buffers": work + reducing},
        first,
        {**kept, "gradients": held["gradients"], "buffers": steps},
        {
            **kept,
            "gathered weights": gathered,
            "weight copies": copies,
            "activations": work * config.eval.batch // micro,
            "logits": eval_logits,
            "buffers": eval_buffers,
        },
    )
    return Prediction(dict(zip(PHASES, phases, strict=True)), micro, accumulation, chunks)


def _first_block(
    case: _Case,
    root: int,
    unit: int,
    accumulation: int,
    whole: dict[str, int],
    kept: dict[str, int],
) -> dict[str, int]:
    """FSDP2's end of the backward pass: in the first block, or where the root is reduced after it.

    whole: the phase as it would be without sharding. kept: what every phase holds.
    """
    # Without a reduction gradients are whole, in the dtype that they are reduced in; the other
    # units' are reduced by now.
    wide = FP32 if accumulation > 1 else case.size
    inside = {
        **whole,
        "gathered weights": (root + unit) * case.size,
        "gradients": whole["gradients"] + (root + unit) * wide,
        "buffers": whole["buffers"] + unit * FP32,
    }
    # The gathered root is gone. Of its gradients the embedding's stays until the end; gloo makes
    # a copy of what it reduces.
    embedding = case.model.shape.vocab_size * case.model.shape.d_model
    staged = root * FP32 * (case.kind == "cpu") + embedding * wide
    after = {
        **kept,
        "gradients": whole["gradients"],
        "buffers": root * FP32 + max(root * wide, staged),
    }
    return max(inside, after, key=lambda parts: sum(parts.values()))


def held_bytes(
    config: Config, model: LanguageModel, routing: Routing, world: int, size: int
) -> dict[str, int]:
    """Weights, gradients and optimizer state of the rank that holds most of them.

    Entries by rank are those of the planned layouts, states those that the rules make.
    """
    layouts = planned_layouts(model, config.parallel, world)
    momentum = getattr(torch, MOMENTA[config.optim.momentum_dtype])
    entries, states = [0] * world, [0] * world
    for info in model.infos:
        words = holding(layouts[info.name]).words
        rule, per_head = routing.rule(info), routing.per_head(info)
        made: dict[int, int] = {}
        for rank, count in enumerate(words):
            if count not in made:
                like = torch.empty(count, device="meta")
                state = new_state(rule, info, per_head, like, momentum)
                # Other packages make theirs as they step: two averages. SOAP, Shampoo hold more.
                made[count] = sum(t.nbytes for t in state.values()) if state else 2 * like.nbytes
            entries[rank] += count
            states[rank] += made[count]
    rank = max(range(world), key=lambda r: 2 * FP32 * entries[r] + states[r])
    own, whole = entries[rank] * FP32, model.parameter_count()
    if config.parallel.layout is Layouts.deepspeed:
        zero = config.parallel.zero
        # The model in its arithmetic, and an fp32 run or copy of it that is stepped.
        weights = own * size // FP32 if zero == 3 else whole * size
        masters = own if zero or size < FP32 else 0
        gradients = own if zero >= 2 else whole * size + own * bool(zero)
        return {
            "weights": weights + masters,
            "gradients": gradients,
            "optimizer state": states[rank],
        }
    return {"weights": own, "gradients": own, "optimizer state": states[rank]}


def copied_bytes(model: LanguageModel, size: int, compiled: bool, checkpointed: bool) -> int:
    """Bytes of copies of the blocks' weights: of autocast, in bf16, and of products with gains.

    Checkpointed blocks keep none for the backward pass, but autocast's cache does until the forward
    pass ends; a compiled one has no cache.
    """
    if compiled and checkpointed:
        return 0
    inner = [info for info in model.infos if info.name.startswith("blocks.")]
    matrices = sum(info.numel for info in inner if len(info.shape) > 1)
    # Weights times rows, then times columns; they are not in autocast's cache.
    if getattr(model.shape, "gains", False):
        return 0 if checkpointed else matrices * (FP32 + size)
    return sum(info.numel for info in inner) * size if size < FP32 else 0


def _loss(case: _Case, tokens: int, chunks: int, gradients: bool) -> tuple[int, int]:
    """Bytes of the logits, and of what stands beside them; see models/loss.py."""
    s = case.model.shape
    width, matrix = s.vocab_size, s.vocab_size * s.d_model
    capped = s.softcap > 0
    if case.gathers_logits:
        # All at once in fp32: logits, log-probabilities, their gradient; with a softcap one more.
        return tokens * width * FP32 * ((3 if gradients else 2) + capped), 0
    rows = -(-tokens // chunks)
    logits = rows * width * case.size
    blocks = 0
    if not case.compiled:  # blocks of rows in fp32: log-probabilities, what a softcap takes,
        # and those of the block before, until they are replaced.
        widened = min(rows, block_rows(case.kind, width))
        count = case.half + (1 if not capped else 3 if gradients else 2) + (widened < rows)
        blocks = widened * width * FP32 * count
    cast = matrix * case.size if case.half and case.alone else 0
    cast += tokens * s.d_model * case.size  # what the head reads
    if not gradients:
        return logits, blocks + cast
    # The weight's gradient of a piece, as it is made and widened; the sum so far and the new one.
    piece = matrix * (FP32 + (case.size if case.half else 0))
    before = matrix * FP32 * (chunks > 1)
    return logits, cast + before + max(blocks, piece + before)


def _backward(case: _Case, tokens: int) -> tuple[int, int, int]:
    """Bytes of the flow of gradients in a block, of the head's gradient, and at the head."""
    s = case.model.shape
    matrix = s.vocab_size * s.d_model * FP32
    # Of the MLP's non-linearity, outside and inside, one of which replaces what was kept of it;
    # with the residual stream's before and after.
    flow = tokens * (case.model.flow_width // case.tensor + 2 * s.d_model) * case.size
    # What the loss has saved, times the gradient of the loss; the input's as well.
    saved = matrix if not case.compiled and case.alone else matrix * case.size // FP32
    return flow, matrix, saved + matrix + tokens * s.d_model * case.size


def _units(model: LanguageModel, tensor: int) -> tuple[int, int]:
    """Parameters of FSDP2's root, and of its largest unit."""
    units = [sum(p.numel() for p in unit.parameters()) for unit in model.shard_units()]
    return (model.parameter_count() - sum(units)) // tensor, max(units) // tensor
