"""What a run will send and compute, known without a process group or a device."""

import json
from dataclasses import replace
from typing import Any

from geon.configs.choices import Objective, TransportChoice, Wire
from geon.configs.schema import Config
from geon.engine.build import Routing, make_model, make_routing, native_half
from geon.engine.fitting import choose, planned_bytes, refusal
from geon.engine.memory import Prediction
from geon.engine.parallel import check_layout, planned_layouts
from geon.engine.sharding import make_sharding, planned_device
from geon.errors import UsageError
from geon.models import LanguageModel
from geon.optim import Rule, plan_of
from geon.optim.shard import Plan
from geon.optim.shard.matrix import Matrix
from geon.optim.shard.planner import candidates
from geon.optim.shard.transports import Job, Transport


def plan_ahead(config: Config, model: LanguageModel, routing: Routing, world: int) -> Plan:
    """The plan that `world` ranks will follow, made without any of them."""
    members = [
        (info, name, rule, routing.per_head(info))
        for name, rule in routing.rules.items()
        if isinstance(rule, Rule)
        for info in routing.members(name)
    ]
    layouts = planned_layouts(model, config.parallel, world)
    return plan_of(members, layouts, make_sharding(config), planned_device(config))


def check_exchange(config: Config, model: LanguageModel, routing: Routing, world: int) -> None:
    """Refuse a choice about the exchange where the matrices of a run leave none.

    Raises:
        UsageError: names the key.
    """
    shard = config.shard
    gram, few = shard.transport is TransportChoice.gram, shard.objective is Objective.bytes
    if world == 1 or not (gram or few or shard.wire is Wire.bf16):
        return
    plan = plan_ahead(config, model, routing, world)
    free = replace(plan.sharding, transport="auto")
    matrices = {job.matrix for bucket in plan.buckets for job in bucket.jobs}
    ways = [(matrix, way) for matrix in matrices for way in candidates(matrix, free)]
    if gram and not any(way.name == "gram" for _, way in ways):
        raise UsageError(
            "shard.transport=gram has no effect: no matrix of this run can go by its Gram matrix "
            "(its rule reads the whole of it, or every rank has it); leave it out"
        )
    if few and len(ways) == len(matrices):
        raise UsageError(
            "shard.objective=bytes has no effect: every matrix of this run can go one way only; "
            "leave it out"
        )
    if shard.wire is Wire.bf16 and not any(_shorter(*way) for way in ways):
        raise UsageError(
            "shard.wire=bf16 has no effect: no update and no direction of this run travels, and "
            "weights and sums are always fp32; leave it out"
        )


def _shorter(matrix: Matrix, way: Transport) -> bool:
    """Whether a matrix takes fewer bytes by a transport where updates travel in bf16."""
    sent = {
        Job(replace(matrix, wire_bytes=size), way, matrix.holders[0]).bytes_sent for size in (2, 4)
    }
    return len(sent) == 2


def report_plan(config: Config, world: int) -> str:
    """What `mode=plan` prints: roles, routes, bytes sent and held; no process group, no GPU."""
    model = make_model(config.model)
    routing = make_routing(model, config.optim, native_half(config, planned_device(config)))
    check_layout(config.parallel, config.model, world)
    plan, kind = plan_ahead(config, model, routing, world), planned_device(config)
    room = planned_bytes(config, kind)
    memory = choose(config, model, routing, plan, world, kind, room)
    if config.plan.format.value == "json":
        return json.dumps(plan_facts(model, routing, plan, memory), indent=2)
    parts = [routing.table(), plan.table(), memory.table(), describe(model)]
    if (reason := refusal(memory, config, room)) is not None:
        parts.append(reason)
    return "\n\n".join(parts)


def plan_facts(
    model: LanguageModel, routing: Routing, plan: Plan, memory: Prediction
) -> dict[str, Any]:
    """Content of plan.json."""
    return {
        "parameters": model.parameter_count(),
        "flops_per_token": model.flops_per_token(),
        "routes": routing.to_dict(),
        **plan.to_dict(),
        "memory": memory.to_dict(),
        "digest": plan.digest,
    }


def describe(model: LanguageModel) -> str:
    """Describe the size and cost of a model in one line."""
    return (
        f"{model.arch}: {model.parameter_count():,} parameters, "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token (forward and backward)"
    )
