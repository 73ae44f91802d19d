"""Started by torchrun: rules x layouts x transports against one process; prints one JSON line.

Weights, gradients and the oracle are functions of names, so that no rank has to tell another. All
rules are stepped by one optimizer, so that matrices of every kind travel together.
"""

import json
import sys
import zlib
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from geon.launch.leave import leave
from geon.optim import Group, HybridOptimizer, Placement, Sharding, on_manifold
from geon.optim.shard import TRANSPORTS, Flat, Plan, Ranks, holding, planner
from geon.optim.shard.transports import Offer
from geon.optim.step import local, view
from tests.distributed.exchange_cases import BESIDE, FEW, cases, draw, start, ways

LR, CLIP = 0.05, 0.5
IDLE, FROZEN = 1, 3
"""Steps in which half of the parameters have no gradient, and the others are frozen."""
CUTS = {
    "fsdp": lambda last: [Shard(0)],
    "cols": lambda last: [Shard(last)],
    "middle": lambda last: [Shard(1 if last == 2 else 0)],
    "fsdp_tp": lambda last: [Shard(0), Shard(last) if last else Replicate()],
    "hsdp": lambda last: [Replicate(), Shard(0)],
    "hsdp_cols": lambda last: [Replicate(), Shard(last)],
    "hsdp_tp": lambda last: [Replicate(), Shard(0), Shard(last) if last else Replicate()],
}
"""How a layout cuts a parameter whose last axis is `last`."""
NAMES = {
    "ddp": ("replicate",),
    "fsdp": ("shard",),
    "middle": ("shard",),
    "fsdp_tp": ("shard", "tensor"),
    "hsdp": ("replicate", "shard"),
    "hsdp_tp": ("replicate", "shard", "tensor"),
}
"""Of the dimensions of a mesh; the others have none."""


class World:
    """What all runs have in common: parameters by name, and whole tensors as a layout cuts them."""

    def __init__(self, which, steps):
        self.steps = steps
        found = cases(which)
        self.cases = {name: case for name, (case, _) in found.items()}
        self.members = {
            info.name: (name, shape, info)
            for name, (_, own) in found.items()
            for shape, info in own
        }
        self.infos = {n: info for n, (_, _, info) in self.members.items()}
        self.infos |= {n: info for n, (info, _) in BESIDE.items()}
        self.order = {name: index for index, name in enumerate(self.infos)}
        self.starts = {name: self._start(name) for name in self.infos}

    def _start(self, name):
        if name in BESIDE:
            return draw(name, "w")
        owner, shape, info = self.members[name]
        case = self.cases[owner]
        return on_manifold(info, start(shape), case.rule, case.per_head)

    def grad(self, name, step):
        """A whole gradient; the same for all rules."""
        return draw(name if name in BESIDE else self.members[name][1], step)

    def rests(self, name, step):
        """Whether a parameter has no gradient: half of them in one step, the others in the next."""
        return step in (IDLE, FROZEN) and self.order[name] % 2 == (step == FROZEN)

    def coasts(self, name, step):
        """Whether it is stepped all the same."""
        return (
            step == IDLE
            and name in self.members
            and self.cases[self.members[name][0]].idle == "coast"
        )

    def groups(self, params):
        """Of the parameters that there are."""
        for name, case in self.cases.items():
            own = [(self.infos[n], p) for n, p in params.items() if n.rpartition("/")[0] == name]
            yield Group(name, case.rule, LR, own, case.per_head, case.idle)
        for name, (info, rule) in BESIDE.items():
            yield Group(name, rule, LR, [(info, params[name])] if name in params else [])


class Run(NamedTuple):
    """What some steps left.

    Attributes:
        wrong: parameters that were moved, or their state, though they rested; or the other way.
        planned: bytes and collectives that the plans have for the buckets that were stepped.
        plans: the first one, and those after a parameter was frozen or came back.
        descents: <gradient, step> of this rank's part, for each step.
    """

    wrong: list[str]
    planned: tuple[int, int]
    plans: list[Plan]
    descents: dict[str, list[float]]


def train(world, params, optimizer, grad_of, watched=()):
    """Some steps: a parameter rests for one, without a gradient or frozen, while others go on."""
    wrong, planned, calls, plans = [], 0, 0, [optimizer.plan]
    descents = {name: [] for name in watched}
    steepest = {n for g in optimizer.param_groups if "nesterov" in g for n in g["param_names"]}
    for step in range(world.steps):
        rests = [name for name in params if world.rests(name, step)]
        for name, param in params.items():
            param.requires_grad_(step != FROZEN or name not in rests)
            param.grad = None if name in rests else grad_of(name, step).clone()  # clipped in place
        still = {name: everything(params[name], optimizer) for name in rests}
        before = {name: local(params[name]).detach().clone() for name in watched}
        optimizer.step()
        for name, old in still.items():
            same = all(map(torch.equal, old, everything(params[name], optimizer)))
            coasts, held = world.coasts(name, step), laid_here(optimizer, name)
            if (same and held) if coasts else not same:
                wrong.append(name)
        for name, old in before.items():
            moved = (old - local(params[name]).detach()).double()
            descents[name].append((local(grad_of(name, step)).double() * moved).sum().item())
        moving = {n for n in steepest if n not in rests or world.coasts(n, step)}
        if optimizer.plan is not plans[-1]:
            plans.append(optimizer.plan)
        for bucket in plans[-1].buckets:
            if not bucket.params.isdisjoint(moving):
                planned += bucket.loads[optimizer.ranks.rank].sent
                calls += bucket.collectives
    return Run(wrong, (planned, calls), plans, descents)


def laid_here(optimizer, name):
    """Whether this rank stores any of a parameter, and not padding alone."""
    return bool(optimizer.layouts[name].pieces(optimizer.ranks.rank))


def everything(param, optimizer):
    """Copies of this rank's part of a weight and of its state."""
    state = [t for t in optimizer.state[param].values() if isinstance(t, torch.Tensor)]
    return [local(tensor).detach().clone() for tensor in (param, *state)]


def reference(world, sharding=None):
    """Weights and descents of one process."""
    params = {name: nn.Parameter(world.starts[name].clone()) for name in world.infos}
    optimizer = HybridOptimizer(list(world.groups(params)), sharding, max_norm=CLIP)
    run = train(world, params, optimizer, world.grad, world.infos)
    assert not run.wrong, run.wrong
    return {name: param.detach() for name, param in params.items()}, run.descents


def at_work(world, weights):
    """Finishes that changed a weight: what the rule without them would have made is another."""
    for name, (owner, shape, _) in world.members.items():
        case = world.cases[owner]
        plain = f"{case.norm} {case.manifold}/{shape}"
        if len(case.finishes) != 1 or not owner.endswith(case.finishes) or plain not in weights:
            continue
        if not torch.equal(weights[name], weights[plain]):
            yield case.finishes[0]


class Laid:
    """A layout: parameters, and the parts of whole tensors that this rank has."""

    def __init__(self, world, layout):
        self.world, self.layout, self.size = world, layout, dist.get_world_size()
        dims = {"fsdp_tp": 2, "hsdp": 2, "hsdp_cols": 2, "hsdp_tp": 3}.get(layout, 1)
        sizes = (2,) * (dims - 1) + (self.size // 2 ** (dims - 1),)
        self.mesh = None
        if layout != "flat":
            self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=NAMES.get(layout))
        self.offers, self._grads = {}, {}

    def flat(self, whole):
        """Runs as DeepSpeed pads them."""
        step = -(-whole.numel() // (2 * self.size)) * 2
        width = prod(whole.shape[2:]) if whole.dim() > 2 else whole.shape[-1]
        return Flat((whole.numel() // width, width), self.size, step)

    @property
    def placement(self):
        """For runs, which do not say how they lie."""
        if self.layout != "flat":
            return None
        layouts = {name: self.flat(whole) for name, whole in self.world.starts.items()}
        return Placement(Ranks.of_group(dist.group.WORLD), layouts)

    def cut(self, whole):
        """What this rank stores of a whole tensor."""
        if self.layout == "ddp":
            return whole
        if self.layout == "flat":
            flat = self.flat(whole)
            own = torch.zeros(flat.step)
            for piece in flat.pieces(dist.get_rank()):
                view(own, piece).copy_(whole.view(flat.shape)[piece.region.slices])
            return own
        last = whole.dim() - 1 if whole.dim() < 4 else 1  # kernels are not cut
        placements = CUTS[self.layout](last)
        return distribute_tensor(whole, self.mesh, placements, src_data_rank=None)

    def grad(self, name, step):
        """A gradient."""
        key = name if name in BESIDE else self.world.members[name][1], step
        if key not in self._grads:
            self._grads[key] = self.cut(self.world.grad(name, step))
        return self._grads[key]

    def params(self, names):
        """Parameters at their start."""
        return {n: nn.Parameter(self.cut(self.world.starts[n].clone())) for n in names}


def offers(matrix):
    """Transports that a matrix may go by."""
    return {n for n, t in TRANSPORTS.items() if t.offer(matrix, False) is not Offer.NO}


@contextmanager
def forced(transport):
    """Plans in which every matrix goes by this transport to which it offers itself."""
    usual = planner.candidates

    def candidates(matrix, sharding):
        chosen = transport in offers(matrix)
        return [TRANSPORTS[transport]] if chosen else usual(matrix, sharding)

    planner.candidates = candidates
    try:
        yield
    finally:
        planner.candidates = usual


def chosen(world, laid, way):
    """Parameters of a run: those that it can say something new about."""
    names = list(world.infos)
    if laid.layout == "middle":  # but for batches the same as fsdp
        names = [n for n in names if n.endswith("/experts")]
    if way.few:
        names = [n for n in names if n.rpartition("/")[0] in FEW]
    if way.forced:
        names = [n for n in names if way.forced in laid.offers.get(n, ())]
    return names


def compare(world, laid, name, way, alone):
    """One run, beside one process."""
    (weights, descents), rank = alone, dist.get_rank()
    params = laid.params(chosen(world, laid, way))
    if not params:
        return None
    with forced(way.forced):
        optimizer = HybridOptimizer(
            list(world.groups(params)),
            way.sharding,
            laid.mesh,
            max_norm=CLIP,
            nonfinite=way.nonfinite,
            placement=laid.placement,
        )
        for matrix in optimizer.plan.matrices if not way.forced else ():
            laid.offers.setdefault(matrix.param, set()).update(offers(matrix))
        summed = sorted({j.matrix.param for j in optimizer.plan.jobs if str(j.transport) == "gram"})
        run = train(world, params, optimizer, laid.grad, summed)
    kinds = {}
    for job in (job for plan in run.plans for job in plan.jobs):
        kinds.setdefault(job.matrix.param, set()).add(str(job.transport))
    errors, prints = [], {}
    for n, param in params.items():
        own, other = local(param).detach(), local(laid.cut(weights[n]))
        errors.append([(own - other).double().square().sum(), not torch.equal(own, other)])
        prints[n] = zlib.crc32(own.numpy().tobytes())
    errors = double(errors)
    dist.all_reduce(errors)
    shares = {n: holding(optimizer.layouts[n]).shares(rank) for n in summed}
    found = double([[d / shares[n] for d in run.descents[n]] for n in summed])
    dist.all_reduce(found)
    return {
        "layout": laid.layout,
        "way": name,
        "params": {
            n: {
                "kinds": sorted(kinds.get(n, ())),
                "error": (square**0.5 / weights[n].norm()).item(),
                "of_move": (square**0.5 / (weights[n] - world.starts[n]).norm()).item(),
                "equal": not differ,
            }
            for n, (square, differ) in zip(params, errors, strict=True)
        },
        "descents": {
            n: [abs(a / b - 1) for a, b in zip(own, descents[n], strict=True) if b]
            for n, own in zip(summed, found.tolist(), strict=True)
        },
        "wrong": run.wrong,
        "apart": apart(prints, optimizer),
        "planned": run.planned,
        "sent": (optimizer.exchange.bytes_sent, optimizer.exchange.collectives),
        "most": max(bucket.collectives for plan in run.plans for bucket in plan.buckets),
        "buckets": len(run.plans[0].buckets),
        "orthogonalized": run.plans[0].orthogonalized,
        "rested": sorted(set(rested(world, run.plans[0]))),
    }


def double(rows):
    """A table that is summed over ranks."""
    return torch.tensor(rows, dtype=torch.float64)


def apart(prints, optimizer):
    """Parameters of which copies on different ranks are not the same to the last bit."""
    everyone = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, prints)
    return [
        name
        for name in prints
        for ranks in holding(optimizer.layouts[name]).copies
        if len({everyone[rank][name] for rank in ranks}) > 1
    ]


def rested(world, plan):
    """Transports by which, in a step, some of a bucket rest while others are stepped."""
    for bucket in plan.buckets:
        for transport in {job.transport for job in bucket.jobs}:
            own = {j.matrix.param for j in bucket.jobs if j.transport is transport}
            if len({world.rests(name, IDLE) for name in own}) == 2:
                yield str(transport)


def main(which, steps, *layouts):
    dist.init_process_group("gloo")
    world = World(which, int(steps))
    alone, exactly = reference(world), reference(world, Sharding(reproducible=True))
    rows = []
    for layout in layouts:
        laid = Laid(world, layout)
        for name, way in ways().items():
            beside = exactly if way.sharding.reproducible else alone
            if (row := compare(world, laid, name, way, beside)) is not None:
                rows.append(row)
    facts = {"rows": rows, "at_work": sorted(set(at_work(world, alone[0])))}
    if dist.get_rank():  # what is summed over ranks is said once
        facts["rows"] = [{k: v for k, v in row.items() if k != "params"} for row in rows]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, facts)
    if dist.get_rank() == 0:
        print(json.dumps(gathered))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave(0)
