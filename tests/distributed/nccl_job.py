"""Run by torchrun, one NCCL rank a process: layouts x transports x rules beside one process.

With NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1 all ranks may share a GPU. Prints one JSON line.
"""

import json
import zlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from geon.launch.leave import leave
from geon.optim import (
    AdamW,
    Group,
    HybridOptimizer,
    Ladder,
    ParamInfo,
    Polar,
    Precision,
    Role,
    Rule,
    Sharding,
    Sign,
    Spectral,
    Stiefel,
)
from geon.optim.manifolds import SpectralBall
from geon.optim.norms import ColNorm

FP32 = Spectral(polar=Polar(precision=Precision.FP32))
RULES = {
    "muon": Rule(FP32, nesterov=True, decay=0.1),
    "normuon": Rule(FP32, second_moment=0.9),
    "hybrid": Rule(FP32, SpectralBall(4.0), decay=0.4, even_rows=True),
    "manifold_muon": Rule(FP32, Stiefel(2.0), nesterov=True, ladder=Ladder(form="gram")),
}
INFOS = {
    "square": ParamInfo("square", (256, 256), Role.HIDDEN),
    "tall": ParamInfo("tall", (512, 128), Role.HIDDEN),
    "wide": ParamInfo("wide", (128, 512), Role.HIDDEN),
    "odd": ParamInfo("odd", (70, 50), Role.HIDDEN),
    "embed": ParamInfo("embed", (333, 64), Role.EMBEDDING),
    "head": ParamInfo("head", (333, 64), Role.HEAD),
    "gain": ParamInfo("gain", (90,), Role.GAIN),
}
HIDDEN = ("square", "tall", "wide", "odd")


def draw(name, step):
    seed = zlib.crc32(f"{name}/{step}".encode())
    return torch.randn(INFOS[name].shape, generator=torch.Generator().manual_seed(seed)).cuda()


def start(rule):
    weights = {name: 0.05 * draw(name, "w") for name in INFOS}
    for name in HIDDEN if rule.manifold.constrains else ():
        weights[name] = rule.manifold.project(weights[name])
    return weights


def make(params, rule, sharding=None, mesh=None):
    def pick(*names):
        return [(INFOS[name], params[name]) for name in names]

    groups = [
        Group("hidden", rule, 0.02, pick(*HIDDEN)),
        Group("embed", Rule(ColNorm()), 0.02, pick("embed")),
        Group("head", Rule(Sign(), radius=5.0), 0.02, pick("head")),
        Group("gain", AdamW(), 0.01, pick("gain")),
    ]
    return HybridOptimizer(groups, sharding, mesh, max_norm=1.0)


def set_grads(params, step):
    for name, p in params.items():
        grad = draw(name, step)
        p.grad = lay(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def lay(tensor, mesh, placements):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def placements(layout, dims):
    return {
        "fsdp": [Shard(0)],
        "cols": [Shard(dims - 1)],
        "fsdp_tp": [Shard(0), Shard(1) if dims > 1 else Replicate()],
        "hsdp": [Replicate(), Shard(0)],
    }[layout]


def place(rule, layout, mesh):
    return {
        name: nn.Parameter(w if layout == "ddp" else lay(w, mesh, placements(layout, w.dim())))
        for name, w in start(rule).items()
    }


def distance(params, alone):
    wholes = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in params.items()}
    return max(((wholes[n] - w).norm() / w.norm()).item() for n, w in alone.items())


def layouts_and_transports(meshes, steps=6):
    found = []
    for rule_name, rule in RULES.items():
        alone = {name: nn.Parameter(w) for name, w in start(rule).items()}
        optimizer = make(alone, rule)
        for step in range(steps):
            set_grads(alone, step)
            optimizer.step()
        for layout, mesh in meshes.items():
            for transport, wire in (("owner", "fp32"), ("gram", "fp32"), ("owner", "bf16")):
                params = place(rule, layout, mesh)
                sharding = Sharding(transport, wire=wire, max_buffer_mb=0.5)
                optimizer = make(params, rule, sharding, mesh)
                for step in range(steps):
                    set_grads(params, step)
                    optimizer.step()
                sent = optimizer.exchange.bytes_sent
                exact = sent == steps * optimizer.plan.bytes_sent[dist.get_rank()]
                row = [rule_name, layout, transport, wire, distance(params, alone), exact]
                found.append(row)
    return found


def nan_on_one_rank(mesh):
    """What each rank says of it."""
    params = place(RULES["muon"], "fsdp", mesh)
    optimizer = make(params, RULES["muon"])
    set_grads(params, 0)
    if dist.get_rank() == 1:
        params["square"].grad.to_local()[0, 0] = float("nan")
    try:
        optimizer.step()
    except FloatingPointError as error:
        return str(error)
    return ""


def under_load(mesh, steps=200):
    """Distance from one process after many steps whose buffers are used again beside products."""
    params, alone = place(RULES["muon"], "fsdp", mesh), start(RULES["muon"])
    alone = {name: nn.Parameter(w) for name, w in alone.items()}
    sharded = make(params, RULES["muon"], Sharding("owner", max_buffer_mb=0.2))
    whole, load = make(alone, RULES["muon"]), torch.randn(2048, 2048, device="cuda")
    for step in range(steps):
        load = (load @ load).clamp(-1, 1)
        set_grads(params, step)
        set_grads(alone, step)
        sharded.step()
        whole.step()
    return distance(params, alone)


def main():
    torch.cuda.set_device(0)
    dist.init_process_group("nccl")
    world = dist.get_world_size()
    flat, square = init_device_mesh("cuda", (world,)), (2, world // 2)
    both = init_device_mesh("cuda", square, mesh_dim_names=("outer", "inner"))
    meshes = {"ddp": flat, "fsdp": flat, "cols": flat, "fsdp_tp": both, "hsdp": both}
    found = {
        "rows": layouts_and_transports(meshes),
        "nan": nan_on_one_rank(flat),
        "under_load": under_load(flat),
    }
    everyone = [None] * world
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


if __name__ == "__main__":
    main()
    leave(0)
