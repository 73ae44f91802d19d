"""Started by torchrun on two ranks: bad numbers on one of them, and what both did; to JSON."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from geon.launch.leave import leave
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral
from geon.optim.health import Watch

SHAPES = {"a": (16, 8), "b": (8, 24), "c": (16, 4)}


def make(mesh=None, watch=None):
    """Two matrices under Muon and one under AdamW; cut by rows where there is a mesh."""
    params = {}
    for name, shape in SHAPES.items():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(len(params)))
        params[name] = nn.Parameter(distribute_tensor(draw, mesh, [Shard(0)]) if mesh else draw)
    infos = {name: ParamInfo(name, shape, Role.HIDDEN) for name, shape in SHAPES.items()}
    matrices = Group("m", Rule(Spectral()), 0.1, [(infos[n], params[n]) for n in "ab"])
    entries = Group("e", AdamW(), 0.1, [(infos["c"], params["c"])])
    return params, HybridOptimizer([matrices, entries], watch=watch)


def feed(params, step, mesh=None, spike=None):
    """The same gradients however many ranks; `spike` (parameter, factor)."""
    for index, (name, param) in enumerate(params.items()):
        generator = torch.Generator().manual_seed(100 * step + index)
        grad = torch.randn(SHAPES[name], generator=generator)
        grad *= spike[1] if spike and spike[0] == name else 1.0
        param.grad = distribute_tensor(grad, mesh, [Shard(0)]) if mesh else grad


def steps(mesh=None):
    """40 steps with a spike in one of them: weights, running norms, gradients cut."""
    params, optimizer = make(mesh, Watch(updates=True, spike=20.0))
    for step in range(40):
        feed(params, step, mesh, ("b", 1e30) if step == 30 else None)
        optimizer.step()
    optimizer.settle()
    whole = {n: p.full_tensor() if mesh else p.detach() for n, p in params.items()}
    return whole, optimizer.watch


def main(rank, mesh):
    found = {}
    whole, watch = steps(mesh)
    alone, other = steps()
    found["far"] = max(float((whole[n] - alone[n]).abs().max()) for n in SHAPES)
    found["cut"] = [watch.cut, other.cut]
    found["norms"] = [[watch.norms[n][1], other.norms[n][1]] for n in SHAPES]
    for kind in ("loss", "gradient", "update"):
        params, optimizer = make(mesh, Watch(updates=True))
        for step in range(2):
            feed(params, step, mesh)
            optimizer.watch.loss = torch.tensor(1.0)
            optimizer.step()
        feed(params, 2, mesh)
        optimizer.watch.loss = torch.tensor(1.0)
        if rank == 1 and kind == "loss":
            optimizer.watch.loss = torch.tensor(torch.nan)
        elif rank == 1 and kind == "gradient":
            params["b"].grad.to_local()[-1, -1] = torch.inf
        elif rank == 1:
            state = optimizer.state[params["b"]]["momentum"].to_local()
            state[-1, -1] = torch.inf
            optimizer.watch.pending = state.sum()
        before = {n: p.full_tensor() for n, p in params.items()}
        try:
            optimizer.step()
            found[kind] = ["nothing", "", False]
        except FloatingPointError as error:
            kept = all(torch.equal(before[n], p.full_tensor()) for n, p in params.items())
            found[kind] = [error.kind, str(error), kept]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    found = main(rank, mesh)
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    leave(0)
