"""Run by torchrun on cuda or cpu: layouts x transports x rules, and an exchange under load.

The first argument is the device; ranks beyond the GPUs share them. Prints one JSON line.
"""

import json
import sys
import zlib
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from geon.engine.devices import rank_device
from geon.launch.env import read_env
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

DEVICE = torch.device("cpu")
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
LOADED = ("hybrid", "manifold_muon")
HIDDEN = ("square", "tall", "wide", "odd")


def draw(name, step):
    seed = zlib.crc32(f"{name}/{step}".encode())
    drawn = torch.randn(INFOS[name].shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE)


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


def layouts_and_transports(meshes, steps):
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


class Load:
    """Work beside the exchange: products on a stream of their own, and memory that is written to.

    `after` is called as soon as a step has returned, while a GPU may still be at it: gradients are
    overwritten, and blocks of the sizes that the step has freed are taken and filled with nan. An
    exchange that let go of a buffer too early, or read a gradient too late, would show it.
    """

    def __init__(self):
        cuda = DEVICE.type == "cuda"
        size = 4096 if cuda else 64
        self.stream = torch.cuda.Stream() if cuda else None
        self.factor = torch.randn(size, size, device=DEVICE)
        if cuda:
            self.stream.wait_stream(torch.cuda.current_stream())

    def before(self):
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for _ in range(4):
                self.factor = (self.factor @ self.factor).clamp(-1, 1)

    def after(self, params):
        for p in params.values():
            own = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            own.fill_(float("nan"))
        sizes = (2**10, 2**14, 2**17, 2**20)
        blocks = [torch.full((size,), float("nan"), device=DEVICE) for size in sizes]
        del blocks


def overwrite_grads(params, step):
    """New gradients in the memory of the last ones."""
    for name, p in params.items():
        grad = draw(name, step)
        whole = lay(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        if p.grad is None:
            p.grad = torch.empty_like(whole)
        p.grad.copy_(whole)


def under_load(mesh, rule, steps):
    """Distance of many steps beside other work from the same ones alone, and from one process."""
    weights, load = {}, Load()
    for way in ("loaded", "quiet", "one"):
        params = place(rule, "fsdp", mesh)
        if way == "one":
            params = {name: nn.Parameter(w) for name, w in start(rule).items()}
        sharding = None if way == "one" else Sharding("owner", max_buffer_mb=0.2)
        optimizer = make(params, rule, sharding, None if way == "one" else mesh)
        for step in range(steps):
            if way == "loaded":
                load.before()
            overwrite_grads(params, step)
            optimizer.step()
            if way == "loaded":
                load.after(params)
        weights[way] = params
    whole = {
        way: {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in params.items()}
        for way, params in weights.items()
    }
    return [distance(whole["loaded"], whole[way]) for way in ("quiet", "one")]


def main():
    global DEVICE
    kind, steps, load_steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    DEVICE = rank_device(kind, read_env())
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    world = dist.get_world_size()
    flat = init_device_mesh(kind, (world,))
    meshes = {"ddp": flat, "fsdp": flat, "cols": flat}
    if world % 2 == 0 and world > 2:
        square = (2, world // 2)
        both = init_device_mesh(kind, square, mesh_dim_names=("outer", "inner"))
        meshes |= {"fsdp_tp": both, "hsdp": both}
    found = {
        "rows": layouts_and_transports(meshes, steps),
        "nan": nan_on_one_rank(flat),
        "under_load": {name: under_load(flat, RULES[name], load_steps) for name in LOADED},
    }
    everyone = [None] * world
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))


if __name__ == "__main__":
    main()
    leave(0)
