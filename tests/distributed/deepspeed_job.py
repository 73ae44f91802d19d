"""Run by torchrun: each stage of DeepSpeed x precision x recipe beside DDP; prints a JSON line."""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from geon.engine.build import build, make_batches, make_corpus, make_model, make_routing
from geon.engine.parallel import Parallel
from geon.engine.trainer import Trainer
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import leave
from tests.distributed.jobs import TINY

STEPS = 4


def trained(recipe, precision, *layout):
    """(loss of the last step over all ranks, largest |change| of each weight)."""
    config = compose(
        [
            *TINY,
            "data.batch_tokens=512",
            "data.tokens=20000",
            "model.n_layer=1",
            f"optim={recipe}",
            "optim.max_norm=0",
            "schedule.steps=12",
            f"parallel.precision={precision}",
            *layout,
        ]
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("replicate",))
    parallel = Parallel(config.parallel, Env(rank, world, rank, True), torch.device("cpu"), mesh)
    corpus, model = make_corpus(config.data, 0), make_model(config.model)
    routing = make_routing(model, config.optim)
    batches = make_batches(config, corpus, rank, world)
    trainer = Trainer(build(config, parallel, corpus, batches, model, routing), None, [])
    names = [info.name for info in routing.infos]
    before = {name: trainer.run.whole(name).clone() for name in names}
    for _ in range(STEPS):
        trainer.train_step()
    moved = {name: (trainer.run.whole(name) - before[name]).abs().max().item() for name in names}
    return parallel.mean(trainer.loss.float()).item(), moved


def main(recipes):
    dist.init_process_group("gloo")
    found = []
    for recipe in recipes:
        for precision in ("fp32", "bf16"):
            wanted, _ = trained(recipe, precision, "parallel=ddp")
            for stage in range(4):
                loss, moved = trained(recipe, precision, f"parallel=deepspeed_z{stage}")
                found.append([recipe, precision, stage, loss, wanted, min(moved.values())])
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
    leave(0)
