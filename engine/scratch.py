"""Scratch memory of an optimizer's step: gradients averaged, matrices solved, buckets under way."""

from collections.abc import Hashable

from geon.configs.schema import Config
from geon.engine.build import MOMENTA
from geon.engine.parallel import planned_layouts
from geon.models import LanguageModel
from geon.optim import Rule
from geon.optim.manifolds import DGram, SpectralSphere, Sphere
from geon.optim.rounding import MOST
from geon.optim.routing import Routing
from geon.optim.shard import Job, Plan, holding

FP32 = 4


def solver_copies(rule: Rule) -> int:
    """fp32 copies of a batch of matrices while a rule steps it, operands and results included.

    Counted on a CPU in fp32; products in bf16 take less. tests/engine/test_memory.py counts again.
    """
    polar = rule.orthogonalizes
    if not rule.needs_weight:
        return 6 if polar else 4
    if not polar:
        return 7
    if isinstance(rule.manifold, (Sphere, SpectralSphere)):
        return 15  # one dual variable, found by several polar factors
    return 13 if isinstance(rule.manifold, DGram) else 10


def scratch_bytes(
    config: Config, routing: Routing, plan: Plan, model: LanguageModel, world: int, kind: str
) -> int:
    """Most bytes that a rank needs at a time in HybridOptimizer.step, on a kind of device."""
    layouts = planned_layouts(model, config.parallel, world)
    updates, largest, rounded, most = 0, 0, 0, MOST
    half = MOMENTA[config.optim.momentum_dtype] != "float32"
    for info in model.infos:
        rule, words = routing.rule(info), max(holding(layouts[info.name]).words)
        if isinstance(rule, Rule):
            # Averaged gradients are tensors of their own under Nesterov's rule, and beside bf16
            # momenta, which are widened.
            updates += words * FP32 * (rule.nesterov + half)
            rounded, most = rounded + words * half, max(most, words)
        else:
            largest = max(largest, words * FP32)
    # AdamW's kernel for a CPU has temporaries of one parameter; the fused one of a GPU has none.
    entries = 3 * largest if kind == "cpu" else 0
    chance = min(rounded, most) * FP32  # before anything is sent
    return updates + max(_buckets(plan, routing), entries, chance)


def _buckets(plan: Plan, routing: Routing) -> int:
    """Most bytes on a rank while one bucket is computed and its neighbours travel."""
    none = [0] * plan.ranks
    arrived, down, up = [none], [none], [none]  # by bucket; a bucket without messages at either end
    for bucket in plan.buckets:
        arrived.append([load.down_got.total for load in bucket.loads])
        down.append([load.down_sent.total + load.down_got.total for load in bucket.loads])
        up.append([load.up_sent.total + load.up_got.total for load in bucket.loads])
    down.append(none)
    most = 0
    for i, bucket in enumerate(plan.buckets, 1):
        solving = _solving(bucket.jobs, plan.ranks, routing)
        sides = zip(solving, arrived[i], down[i + 1], up[i - 1], strict=True)
        most = max(most, *(sum(side) for side in sides))
    return most


def _solving(jobs: tuple[Job, ...], ranks: int, routing: Routing) -> list[int]:
    """Bytes by rank of a bucket's largest batch in its solver, and of the other batches' results.

    An owner's results wait for the whole bucket; pieces that a rank keeps are written batch by
    batch.
    """
    batches: list[dict[Hashable, int]] = [{} for _ in range(ranks)]
    results: list[dict[Hashable, int]] = [{} for _ in range(ranks)]
    copies = {name: solver_copies(r) for name, r in routing.rules.items() if isinstance(r, Rule)}
    for job in jobs:
        matrix, key = job.matrix, (job.matrix.kind, job.transport.name)
        if job.transport.name == "owner":
            size = matrix.shape[0] * matrix.shape[1] * FP32
            results[job.owner][key] = results[job.owner].get(key, 0) + size
            sizes = {job.owner: size * copies[matrix.route]}
        else:
            sizes = {
                rank: matrix.holding.words[rank] * FP32 * copies[matrix.route]
                + (job.work_bytes(rank) if job.transport.owned else 0)  # sums of its own
                for rank in matrix.holding.of
            }
        for rank, size in sizes.items():
            batches[rank][key] = batches[rank].get(key, 0) + size
    return [
        max((size - made.get(key, 0) for key, size in own.items()), default=0) + sum(made.values())
        for own, made in zip(batches, results, strict=True)
    ]
