"""Started by torchrun: every layout x transport x rule against one process; prints one JSON line.

Weights, gradients and the oracle are functions of names, so that no rank has to tell another.
"""

import json
import sys
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
    ParamInfo,
    Polar,
    Role,
    Rule,
    Spectral,
    Stiefel,
)
from geon.optim.norms import ColNorm, Sign
from geon.optim.shard import Wishes

STEPS, ACCUMULATION, LR, CLIP = 10, 2, 0.02, 0.5
HIDDEN = {
    "square": ParamInfo("square", (24, 24), Role.HIDDEN),
    "tall": ParamInfo("tall", (64, 12), Role.HIDDEN),
    "wide": ParamInfo("wide", (12, 64), Role.HIDDEN),
    "odd": ParamInfo("odd", (7, 5), Role.HIDDEN),
    "tiny": ParamInfo("tiny", (2, 3), Role.HIDDEN),
    "experts": ParamInfo("experts", (4, 6, 5), Role.HIDDEN),
    "qkv": ParamInfo("qkv", (36, 12), Role.HIDDEN, (12, 12, 12), 3),
    "out": ParamInfo("out", (12, 12), Role.HIDDEN, (), 3, 1),
}
EMBED = ParamInfo("embed", (21, 8), Role.EMBEDDING)
HEAD = ParamInfo("head", (21, 8), Role.HEAD)
GAIN = ParamInfo("gain", (9,), Role.GAIN)
INFOS = {**HIDDEN, "embed": EMBED, "head": HEAD, "gain": GAIN}

RULES = {
    "muon": Rule(Spectral("muon", Polar("keller", 5)), nesterov=True, decay=0.1),
    "manifold_muon": Rule(Spectral(), Stiefel(2.0), nesterov=True),
    "normuon": Rule(Spectral("none"), second_moment=0.9),
    "heads": Rule(Spectral(polar=Polar("keller", 5))),
}


def draw(*words):
    """Gaussian of the shape of the parameter named first; depends on all the words."""
    seed = zlib.crc32("/".join(map(str, words)).encode())
    return torch.randn(INFOS[words[0]].shape, generator=torch.Generator().manual_seed(seed))


def start(rule):
    weights = {name: 0.1 * draw(name, "w") for name in INFOS}
    if rule.manifold.constrains:
        for name, info in HIDDEN.items():
            for block in info.blocks(False):
                flat = weights[name].view(info.matrix_shape)
                flat[block.slices] = rule.manifold.project(flat[block.slices])
    return weights


def optimizer(params, rule, name, wishes, mesh, wire=torch.float32):
    def pick(names):
        return [(INFOS[n], params[n]) for n in names]

    groups = [
        Group("hidden", rule, LR, pick(HIDDEN), per_head=name == "heads"),
        Group("embed", Rule(ColNorm()), LR, pick(["embed"])),
        Group("head", Rule(Sign(), radius=10.0), LR, pick(["head"])),
        Group("gain", AdamW(), LR, pick(["gain"])),
    ]
    return HybridOptimizer(groups, wishes, mesh, wire, max_norm=CLIP)


def train(params, opt, watch=True):
    """Ten steps of two micro-batches; returns <gradient, step> of every hidden matrix and step."""
    descents = []
    for step in range(STEPS):
        before = {n: whole(params[n]).clone() for n in HIDDEN if watch}
        opt.zero_grad()
        for micro in range(ACCUMULATION):
            for name, p in params.items():
                grad = draw(name, step, micro) / ACCUMULATION
                if isinstance(p, DTensor):
                    grad = distribute_tensor(grad, p.device_mesh, p.placements)
                p.grad = grad if p.grad is None else p.grad + grad
        opt.step()
        for n in before:
            grad = sum(draw(n, step, micro) for micro in range(ACCUMULATION)) / ACCUMULATION
            descents.append((grad * (before[n] - whole(params[n]))).sum().item())
    return torch.tensor(descents)


def placements(layout, name, mesh):
    """How a layout cuts a parameter."""
    matrix = len(INFOS[name].shape) > 1
    last = len(INFOS[name].shape) - 1
    return {
        "ddp": [Replicate()],
        "fsdp": [Shard(0)],
        "cols": [Shard(last)],
        "middle": [Shard(1 if last == 2 else 0)],
        "fsdp_tp": [Shard(0), Shard(last)] if matrix else [Shard(0), Replicate()],
        "hsdp": [Replicate(), Shard(0)],
        "hsdp_cols": [Replicate(), Shard(last)],
        "hsdp_tp": [Replicate(), Shard(0), Shard(last) if matrix else Replicate()],
    }[layout][: mesh.ndim]


def meshes(world):
    one = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    found = {"fsdp": one, "cols": one, "middle": one}
    found["ddp"] = init_device_mesh("cpu", (world,), mesh_dim_names=("replicate",))
    if world % 2 == 0 and world > 2:
        half = (2, world // 2)
        found["fsdp_tp"] = init_device_mesh("cpu", half, mesh_dim_names=("shard", "tensor"))
        found["hsdp"] = init_device_mesh("cpu", half, mesh_dim_names=("replicate", "shard"))
        found["hsdp_cols"] = found["hsdp"]
    if world == 8:
        names = ("replicate", "shard", "tensor")
        found["hsdp_tp"] = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)
    return found


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def place(weights, layout, mesh):
    if layout == "ddp":
        return {n: nn.Parameter(w.clone()) for n, w in weights.items()}
    return {
        n: nn.Parameter(distribute_tensor(w.clone(), mesh, placements(layout, n, mesh)))
        for n, w in weights.items()
    }


def compare(rule_name, layout, mesh, wishes, alone, wire=torch.float32):
    """Errors of one case, and what was sent against what was planned."""
    weights, descents = alone
    params = place(start(RULES[rule_name]), layout, mesh)
    opt = optimizer(params, RULES[rule_name], rule_name, wishes, mesh, wire)
    watch = wishes.transport in ("auto", "gram")
    own = train(params, opt, watch)
    rank = dist.get_rank()
    kinds = {}
    for job in opt.plan.jobs:
        kinds.setdefault(job.matrix.param, str(job.transport))
    return {
        "rule": rule_name,
        "layout": layout,
        "transport": wishes.transport,
        "error": {
            name: ((whole(p) - weights[name]).norm() / weights[name].norm()).item()
            for name, p in params.items()
        },
        "equal": all(torch.equal(whole(p), weights[name]) for name, p in params.items()),
        "descent": ((own - descents).abs() / descents.abs()).median().item() if watch else 0.0,
        "kinds": kinds,
        "bytes": [opt.exchange.bytes_sent, STEPS * opt.plan.bytes_sent[rank]],
        "collectives": [
            opt.exchange.collectives,
            STEPS * sum(b.collectives for b in opt.plan.buckets),
            max((b.collectives for b in opt.plan.buckets), default=0),
        ],
        "orthogonalized": opt.plan.orthogonalized,
    }


def reference(rule_name, wishes=None):
    rule = RULES[rule_name]
    params = {n: nn.Parameter(w.clone()) for n, w in start(rule).items()}
    descents = train(params, optimizer(params, rule, rule_name, wishes, None))
    return {n: p.detach() for n, p in params.items()}, descents


def main(which):
    dist.init_process_group("gloo")
    found = meshes(dist.get_world_size())
    results = []
    for rule_name in which or RULES:
        alone = reference(rule_name)
        exactly = reference(rule_name, Wishes(reproducible=True))
        for layout, mesh in found.items():
            for transport in ("auto", "owner", "gram", "allgather"):
                wishes = Wishes(transport, max_buffer_mb=0.01)
                results.append(compare(rule_name, layout, mesh, wishes, alone))
            exact = compare(rule_name, layout, mesh, Wishes(reproducible=True), exactly)
            results.append({**exact, "transport": "reproducible"})
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
    leave(0)
