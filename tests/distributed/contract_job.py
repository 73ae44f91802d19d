"""Started by torchrun: what a torch user does on two ranks; prints one JSON line of what held."""

import copy
import json
import math
import sys
import traceback

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from geon.errors import UsageError
from geon.launch.leave import leave
from geon.optim import HybridOptimizer
from tests.optim.contract import RULES, Net, grad, group, snap, train


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def far(net, optimizer, twin, other):
    """Largest difference of weights and states, in units of the larger."""
    one, two = (snap(*pair) for pair in ((net, optimizer), (twin, other)))
    assert one.keys() == two.keys(), (list(one), list(two))
    found = 0.0
    for key, value in one.items():
        mine, theirs = whole(value).float(), whole(two[key]).float()
        assert mine.isfinite().all(), key
        found = max(found, ((mine - theirs).norm() / theirs.norm().clamp_min(1e-6)).item())
    return found


def give(net, seed, names="ab"):
    """`feed` for DTensors."""
    for name, param in net.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        plain = grad(leaf, torch.empty(param.shape, dtype=param.dtype), seed)
        if isinstance(param, DTensor):
            plain = distribute_tensor(plain, param.device_mesh, param.placements)
        param.grad = plain if leaf in names and param.requires_grad else None


def steps(net, optimizer, seeds, names="ab"):
    for seed in seeds:
        give(net, seed, names)
        optimizer.step()


def alone(kind, seeds, names="ab"):
    net = Net(kind)
    optimizer = HybridOptimizer([group(net)])
    for seed in seeds:
        train(net, optimizer, [seed], names)
    return net, optimizer


def sharded(kind, **options):
    net = fully_shard(Net(kind))
    return net, HybridOptimizer([group(net)], **options)


def default_mesh(kind):
    """fully_shard(model) as everybody calls it."""
    net, optimizer = sharded(kind)
    steps(net, optimizer, range(3))
    return far(net, optimizer, *alone(kind, range(3)))


def backward(kind):
    """With gradients by FSDP's own hooks."""
    net, optimizer = sharded(kind)
    for seed in range(2):
        optimizer.zero_grad()
        net(seed).backward()
        optimizer.step()
    return far(net, optimizer, *alone(kind, range(2)))


def frozen_sharded(kind):
    """Frozen and thawed shards."""
    net, optimizer = sharded(kind)
    steps(net, optimizer, [0])
    net.a.requires_grad_(False)
    steps(net, optimizer, [1])
    net.a.requires_grad_(True)
    steps(net, optimizer, [2])
    twin, other = alone(kind, [0])
    train(twin, other, [1], "b")
    train(twin, other, [2])
    return far(net, optimizer, twin, other)


def made_before(kind):
    """The optimizer is made, even stepped, before the model is cut, and is handed the DTensors."""
    net, optimizer = alone(kind, [0])
    fully_shard(net)
    optimizer.param_groups[0]["params"] = [net.a, net.b]
    steps(net, optimizer, [1, 2])
    assert isinstance(next(iter(optimizer.state_tensors().values())), torch.Tensor)
    return far(net, optimizer, *alone(kind, range(3)))


def ddp(kind):
    """Without a mesh each rank computes all; with one they share the work."""
    found = []
    for mesh in (None, init_device_mesh("cpu", (2,), mesh_dim_names=("replica",))):
        net = DistributedDataParallel(Net(kind))
        optimizer = HybridOptimizer([group(net.module)], mesh=mesh)
        for seed in range(2):
            optimizer.zero_grad()
            net(seed).backward()
            optimizer.step()
        found.append(far(net.module, optimizer, *alone(kind, range(2))))
    return max(found)


def copies(kind):
    """A copy under DDP, and one of shards, step as the original does."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replica",))
    net = DistributedDataParallel(Net(kind))
    optimizer = HybridOptimizer([group(net.module)], mesh=mesh)
    steps(net, optimizer, [0])
    twin, other = copy.deepcopy((net, optimizer))
    steps(twin, other, [1])
    assert other.ranks.size == 2
    found = [far(twin.module, other, *alone(kind, range(2)))]
    found.append(far(net.module, optimizer, *alone(kind, range(1))))
    steps(net, optimizer, [1])
    found.append(far(net.module, optimizer, *alone(kind, range(2))))
    return max(found)


def nonfinite(kind):
    """On one rank: told on both, and nothing is changed."""
    found = []
    for skip in (False, True):
        net, optimizer = sharded(kind, nonfinite="skip" if skip else "raise")
        steps(net, optimizer, [0])
        give(net, 1)
        if dist.get_rank() == 1:
            net.a.grad.to_local().view(-1)[0] = math.nan
        said = ""
        try:
            optimizer.step()
        except FloatingPointError as error:
            said = str(error)
        assert skip or "is not finite" in said, said
        assert optimizer.skipped == skip
        found.append(far(net, optimizer, *alone(kind, [0])))
        steps(net, optimizer, [2])
        found.append(far(net, optimizer, *alone(kind, [0, 2])))
    return max(found)


def saved(kind):
    """torch.distributed.checkpoint's state dicts, whole and cut, to another layout and back."""
    net, optimizer = sharded(kind)
    steps(net, optimizer, [0, 1])
    found = []
    for full in (False, True):
        options = StateDictOptions(full_state_dict=full)
        state = get_optimizer_state_dict(net, optimizer, options=options)
        twin, other = sharded(kind)
        set_optimizer_state_dict(twin, other, state, options=options)
        _copy_weights(net, twin)
        found.append(far(net, optimizer, twin, other))
    plain, third = alone(kind, [])
    third.load_state_dict(optimizer.state_dict())
    _copy_weights(net, plain)
    steps(net, optimizer, [2])
    train(plain, third, [2])
    found.append(far(net, optimizer, plain, third))
    back, fourth = sharded(kind)
    fourth.load_state_dict(third.state_dict())
    states = third.state_tensors()
    for key, value in fourth.state_tensors().items():
        assert torch.equal(whole(value), states[key]), key
    return max(found)


def _copy_weights(net, twin):
    with torch.no_grad():
        for name, param in twin.named_parameters():
            param.copy_(
                whole(net.get_parameter(name))
                if not isinstance(param, DTensor)
                else net.get_parameter(name)
            )


def warm_up(kind):
    """A step at lr 0 moves no shard."""
    net, optimizer = sharded(kind)
    before = {n: p.to_local().clone() for n, p in net.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    steps(net, optimizer, [0])
    assert all(torch.equal(before[n], p.to_local()) for n, p in net.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.02
    steps(net, optimizer, [1])
    twin, other = alone(kind, [])
    other.param_groups[0]["lr"] = 0.0
    train(twin, other, [0])
    other.param_groups[0]["lr"] = 0.02
    train(twin, other, [1])
    return far(net, optimizer, twin, other)


def bf16_momenta(kind):
    """By rows, by columns and copied, momenta are those of one process, bit by bit."""
    half = {"momentum": torch.bfloat16}
    twin = Net(kind)
    other = HybridOptimizer([group(twin)], **half)
    train(twin, other, range(4))
    wanted, found = snap(twin, other), 0.0
    for lies in ("rows", "columns", "copies"):
        if lies == "copies":
            net = Net(kind)
            optimizer = HybridOptimizer([group(net)], mesh=init_device_mesh("cpu", (2,)), **half)
        else:
            axis = {"rows": 0, "columns": -1}[lies]
            net = fully_shard(Net(kind), shard_placement_fn=lambda p, a=axis: Shard(a % p.ndim))
            optimizer = HybridOptimizer([group(net)], **half)
        steps(net, optimizer, range(4))
        for key, value in optimizer.state_tensors().items():
            if key.endswith((".momentum", ".draws")):
                assert torch.equal(whole(value), wanted[key]), (lies, key)
        found = max(found, far(net, optimizer, twin, other))
    return found


def off_manifold(kind):
    """Weights off their manifold are refused on every rank, and brought there on every rank."""
    net = fully_shard(Net("muon"))
    one = group(net, RULES["manifold muon"])
    try:
        HybridOptimizer([one])
        said = ""
    except UsageError as error:
        said = str(error)
    assert "'a' is not on Stiefel" in said, said
    HybridOptimizer([one], project=True)
    twin = Net("muon")
    plain = group(twin, RULES["manifold muon"])
    plain.project_()
    return max((whole(p) - twin.get_parameter(n)).norm().item() for n, p in net.named_parameters())


CASES = [default_mesh, backward, frozen_sharded, made_before, ddp, copies, nonfinite, saved]
CASES += [warm_up, bf16_momenta, off_manifold]

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case in CASES:
        for kind in RULES if case is not off_manifold else ["manifold muon"]:
            try:
                said = case(kind)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            found[f"{case.__name__}, {kind}"] = said
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))
        sys.stdout.flush()
    leave(0)
