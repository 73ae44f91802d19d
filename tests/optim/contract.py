"""Two parameters under every kind of rule, and what a step leaves of them."""

from dataclasses import replace

import torch
from torch import nn

from geon.optim import FINISHES, AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral
from geon.optim.manifolds import SpectralBall, Stiefel
from geon.optim.norms import RMS, ColNorm, Sign

LR = 0.02
RULES = {
    "muon": Rule(Spectral(), nesterov=True, decay=0.1),
    "normuon": Rule(Spectral(), decay=0.1, second_moment=0.9),
    "hybrid": Rule(Spectral(), SpectralBall(4.0), 0.9, True, decay=0.4, even_rows=True),
    "manifold muon": Rule(Spectral(), Stiefel(), nesterov=True),
    "scion": Rule(Spectral(), decay=1.0),
    "colnorm": Rule(ColNorm(), momentum=0.9),
    "sign": Rule(Sign(), radius=10.0),
    "rms": Rule(RMS()),
    **{
        f"muon, {name}": Rule(Spectral(), decay=0.1, finishes=(finish(),))
        for name, finish in FINISHES.items()
    },
    "adamw": AdamW(decay=0.1),
}
ROLES = {"colnorm": Role.EMBEDDING, "sign": Role.HEAD, "rms": Role.GAIN}
SHAPES = {"a": (12, 8), "b": (6, 10)}
STEEPEST = [kind for kind in RULES if kind != "adamw"]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Parameters a and b; the gradient of its loss is a draw of the seed, of each parameter."""

    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        self.kind = kind
        for i, (name, shape) in enumerate(SHAPES.items()):
            shape, rule = shape[1:] if kind == "rms" else shape, RULES[kind]
            weight = gauss(shape, i)
            if isinstance(rule, Rule):
                weight = rule.manifold.project(weight)
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))

    def forward(self, seed):
        return sum((p * grad(n, p, seed)).sum() for n, p in self.named_parameters())


def grad(name, param, seed):
    """The gradient of a parameter at a step, in its dtype."""
    return gauss(param.shape, 1000 * seed + 100 + ord(name[0])).to(param.dtype)


def group(net, rule=None, names="ab", name="g", lr=LR, **options):
    """A group of these parameters of a net."""
    params = dict(net.named_parameters())
    role = ROLES.get(net.kind, Role.HIDDEN)
    members = [(ParamInfo(n, tuple(params[n].shape), role), params[n]) for n in names]
    return Group(name, rule or RULES[net.kind], lr, members, **options)


def make(kind, dtype=torch.float32, rule=None, **options):
    """A net and its optimizer."""
    net = Net(kind, dtype)
    return net, HybridOptimizer([group(net, rule)], **options)


def mixed(**options):
    """Three nets' parameters in one optimizer, a group each: Muon, Manifold Muon and AdamW."""
    nets = {kind: Net(kind) for kind in ("muon", "manifold muon", "adamw")}
    groups = []
    for kind, net in nets.items():
        one = group(net, name=kind)
        one.params = [(replace(info, name=f"{kind}.{info.name}"), p) for info, p in one.params]
        groups.append(one)
    return nn.ModuleDict(nets), HybridOptimizer(groups, **options)


def feed(net, seed, names=None):
    """Give gradients to these parameters, and none to the others."""
    for name, param in net.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        given = param.requires_grad and (names is None or leaf in names)
        param.grad = grad(leaf, param, seed) if given else None


def train(net, optimizer, seeds, names=None):
    for seed in seeds:
        feed(net, seed, names)
        optimizer.step()


def snap(net, optimizer, only=""):
    """Copies of weights and state of the parameters whose names begin so."""
    found = {n: p.detach().clone() for n, p in net.named_parameters()}
    found |= {k: v.clone() for k, v in optimizer.state_tensors().items()}
    return {k: v for k, v in found.items() if k.startswith(only)}


def same(one, other):
    """Bit for bit, dtypes too."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def changed(rule, **numbers):
    """The rule made with other numbers."""
    if isinstance(rule, AdamW):
        return replace(rule, **numbers)
    return replace(rule, **numbers, second_moment=0.0, even_rows=False)
