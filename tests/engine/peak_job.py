"""Run by torchrun: peaks of a step on each rank beside the predicted ones, by layout."""

import json

import torch.distributed as dist

from geon.engine import memory
from geon.engine.build import build, make_batches, make_corpus, make_model, make_routing
from geon.engine.parallel import start
from geon.engine.planning import plan_ahead
from geon.engine.trainer import Trainer
from geon.launch.compose import compose
from geon.launch.env import read_env
from geon.launch.leave import leave
from tests.distributed.jobs import TINY
from tests.engine.memory_counts import step_peaks

SIZES = ["data.vocab_size=1024", "model.n_layer=3", "model.n_head=4", "model.d_model=128"]
ROOT_LAST = ["optim=muon", "data.vocab_size=8192", "data.micro_batch=1"]
"""FSDP2 holds most when it reduces its root (bf16), or at the head (fp32)."""
CASES = [
    ["parallel=ddp", "optim=muon", "data.micro_batch=4"],
    ["parallel=fsdp", "optim=manifold_muon", "shard.transport=owner"],
    ["parallel=fsdp", *ROOT_LAST, "parallel.precision=bf16"],
    ["parallel=fsdp", *ROOT_LAST],
    ["parallel=tp", "optim=muon", "model.softcap=15", "parallel.precision=bf16"],
]


def measure(options, env):
    config = compose([*TINY, *SIZES, "parallel.compile=false", *options])
    corpus, model = make_corpus(config.data, 0), make_model(config.model)
    routing = make_routing(model, config.optim)
    batches = make_batches(config, corpus, env.rank, env.world)
    parallel = start(config.parallel, "cpu", env)
    plan = plan_ahead(config, model, routing, env.world)
    totals = memory.predict(config, model, routing, plan, env.world, "cpu", batches.micro).totals
    run = build(config, parallel, corpus, batches, model, routing)
    return {
        "options": options,
        "training": max(totals[phase] for phase in memory.PHASES[:4]),
        "step": totals["step"],
        "counted": step_peaks(Trainer(run, None, [])),
    }


if __name__ == "__main__":
    env, found = read_env(), []
    for options in CASES:
        found.append(measure(options, env))
        dist.init_process_group = lambda *args, **options: None  # one group for all cases
    everyone = [None] * env.world
    dist.all_gather_object(everyone, found)
    if env.main:
        print(json.dumps(everyone), flush=True)
    leave(0)
