"""Started by torchrun: one rank, or all, do what they should not; each rank prints what it saw."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from geon.errors import ExchangeError, UsageError
from geon.launch.leave import leave
from geon.optim import Group, HybridOptimizer, ParamInfo, Role, Rule, Sharding, Spectral

TIMEOUT = 20.0
SHORT = 4.0


def parameter(mesh, placement=None):
    draw = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(distribute_tensor(draw, mesh, [placement or Shard(0)]))


def optimizer(param, name="blocks.0.up.weight", mesh=None, nonfinite="raise", **sharding):
    group = Group("g", Rule(Spectral()), 0.1, [(ParamInfo(name, (16, 8), Role.HIDDEN), param)])
    return HybridOptimizer([group], Sharding(**sharding), mesh, nonfinite=nonfinite)


def step(opt, param):
    param.grad = torch.ones_like(param)
    opt.step()


def main(fault):
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    if fault == "other plan":
        optimizer(parameter(mesh), transport="gram" if rank == 1 else "owner")
    elif fault == "other model":
        optimizer(parameter(mesh), "blocks.1.up.weight" if rank == 1 else "blocks.0.up.weight")
    elif fault == "mesh in another order":
        ranks = torch.arange(dist.get_world_size()).flip(0)
        optimizer(parameter(DeviceMesh("cpu", ranks)))
    elif fault == "unknown layout":
        local = torch.ones(16, 8)
        optimizer(nn.Parameter(DTensor.from_local(local, mesh, [Partial()], run_check=False)))
    elif fault == "two meshes":
        other = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("a", "b"))
        optimizer(parameter(other["b"]), mesh=mesh)
    elif fault == "sharded afterwards":
        whole = nn.Parameter(parameter(mesh).full_tensor())
        opt = optimizer(whole, mesh=mesh)
        parameter(mesh).grad = None  # what fully_shard puts in its place is not in the optimizer
        opt.step()
    elif fault in ("dies", "hangs", "dies before"):
        param = parameter(mesh)
        look = "raise" if fault == "dies before" else "ignore"
        opt = optimizer(param, transport="owner", nonfinite=look)
        step(opt, param)
        if rank == 1:
            if fault != "hangs":
                os._exit(0)
            time.sleep(3 * SHORT)
            return
        step(opt, param)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *faults = sys.argv[1:]
    limit = SHORT if "hangs" in faults else TIMEOUT
    dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
    for fault in faults:
        begin, said = time.monotonic(), "nothing"
        try:
            main(fault)
        except (UsageError, ExchangeError) as error:
            said = f"{type(error).__name__}: {error}"
        spent = time.monotonic() - begin
        Path(folder, f"{fault} {os.environ['RANK']}").write_text(f"{spent:.1f}\n{said}")
    # A rank that goes takes its peers along: leave together where that is possible.
    time.sleep(2.0)
    leave(0)
