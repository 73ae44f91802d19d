"""What the registries make: rules with their finishes, shapes, and every way to step them."""

import itertools
import zlib
from functools import cache
from typing import NamedTuple

import torch

from geon.errors import UsageError
from geon.optim import (
    FINISHES,
    MANIFOLDS,
    NORMS,
    AdamW,
    ParamInfo,
    Polar,
    Role,
    Rule,
    Sharding,
    Spectral,
    on_manifold,
)
from geon.optim.norms import ColNorm, Sign
from geon.optim.shard import TRANSPORTS
from geon.optim.shard.sharding import CHOICES

SHAPES = {
    "tall": ((32, 6), {}),
    "square": ((8, 8), {}),
    "wide": ((6, 32), {}),
    "odd": ((7, 5), {}),
    "tiny": ((1, 3), {}),
    "experts": ((3, 6, 5), {}),
    "qkv": ((18, 6), {"splits": (6, 6, 6), "heads": 3}),
    "out": ((6, 6), {"heads": 3, "head_axis": 1}),
    "turned": ((6, 16), {"splits": (8, 4, 4), "heads": (2, 1, 1), "transposed": True}),
    "woven": ((18, 6), {"splits": (6, 6, 6), "heads": 3, "interleaved": 3}),
    "oss": ((2, 5, 8), {"splits": (4, 4), "transposed": True, "interleaved": 4}),
    "kernel": ((6, 2, 3, 3), {"kernel": 2}),
    "groups": ((6, 2, 5), {"kernel": 1, "splits": (3, 3), "by_position": True}),
}
"""Shape, and how the weight is stored, heads, and the axis of the heads."""
BESIDE = {
    "embed": (ParamInfo("embed", (21, 8), Role.EMBEDDING), Rule(ColNorm())),
    "head": (ParamInfo("head", (21, 8), Role.HEAD), Rule(Sign(), radius=10.0)),
    "gain": (ParamInfo("gain", (9,), Role.GAIN), AdamW()),
}
"""What is stepped beside the hidden matrices, in groups of their own."""


class Case(NamedTuple):
    """A rule, and what of the registries is in it."""

    rule: Rule
    norm: str
    manifold: str
    finishes: tuple[str, ...]
    per_head: bool
    idle: str

    def infos(self, name):
        """Its parameters: one of every shape that its manifold has points of."""
        for shape, options in SHAPES.items():
            info = ParamInfo(f"{name}/{shape}", options[0], Role.HIDDEN, **options[1])
            try:
                on_manifold(info, start(shape), self.rule, self.per_head)
            except UsageError:
                continue
            yield shape, info


def make(kind, manifold="euclidean", finishes=(), per_head=False, idle="skip", **options):
    """A case with default options, and weight decay where it is taken; None where there is none."""
    for decay in (0.1, 0.0):
        try:
            own = {"norm": NORMS[kind](), "decay": decay} | options
            rule = Rule(
                manifold=MANIFOLDS[manifold](),
                finishes=tuple(FINISHES[finish]() for finish in finishes),
                **own,
            )
        except UsageError:
            continue
        return Case(rule, kind, manifold, tuple(finishes), per_head, idle)
    return None


def every_case():
    """Every norm, manifold and finish: alone, some together, and with what else a rule takes."""
    found = {}

    def add(kind, manifold="euclidean", finishes=(), mark="", **options):
        name = " ".join([kind, manifold, *finishes, *([mark] if mark else [])])
        if (case := make(kind, manifold, finishes, **options)) is not None:
            found[name] = case

    for kind, manifold in itertools.product(NORMS, MANIFOLDS):
        add(kind, manifold)
        add(kind, manifold, mark="nesterov", nesterov=True)
        add(kind, manifold, mark="heads", per_head=True)
        add(kind, manifold, mark="coasts", idle="coast")
        for finish in FINISHES:
            add(kind, manifold, (finish,))
    for finish in FINISHES:
        add("spectral", "euclidean", (finish,), mark="heads", per_head=True)
        add("spectral", "euclidean", (finish,), mark="coasts", idle="coast")
    for pair in itertools.permutations(FINISHES, 2):
        add("spectral", "euclidean", pair)
    keller = Spectral("muon", Polar("keller", 5))
    add("spectral", mark="keller", norm=keller, nesterov=True)
    return found


FEW = (
    "spectral euclidean",
    "spectral euclidean keller",
    "spectral euclidean nesterov",
    "spectral euclidean heads",
    "spectral euclidean coasts",
    "spectral euclidean second_moment",
    "spectral euclidean second_moment heads",
    "spectral euclidean second_moment coasts",
    "spectral stiefel",
    "spectral stiefel nesterov",
    "spectral stiefel heads",
    "spectral stiefel coasts",
    "rownorm euclidean",
    "rownorm euclidean heads",
    "rownorm euclidean cautious_decay",
    "sign oblique update_floor",
)
"""In most shapes. Of the others, `most` takes some shapes, and fewer marks and pairs."""


def in_most(name, case):
    """Each norm, manifold and finish, with those that it is likeliest to interfere with."""
    if name in FEW:
        return True
    if name.split()[-1] not in (case.manifold, *case.finishes):
        return False
    if len(case.finishes) == 2:
        return list(case.finishes) == sorted(case.finishes, key=list(FINISHES).index)
    grounds = {"euclidean": ("spectral", "rownorm", "sign"), "spectral_ball": ("spectral",)}
    return not case.finishes or case.norm in grounds.get(case.manifold, NORMS)


def cases(which):
    """Cases by name, with the shapes that each is stepped in: all, most or few of them."""
    found = every_case()
    if which == "few":
        found = {name: found[name] for name in FEW}
    elif which == "most":
        found = {name: case for name, case in found.items() if in_most(name, case)}
    members = {}
    for index, (name, case) in enumerate(found.items()):
        own = list(case.infos(name))
        if which != "all":  # of the shapes two in three; one that is stored otherwise
            other = [one for one in own if one[1].storage and one[0] != "qkv"]
            kept = [other[index % len(other)]] if other else []
            plain = [one for one in own if one not in other]
            own = [one for k, one in enumerate(plain) if (k + index) % 3] + kept
        if which == "most" and name not in FEW:  # the first, and another one in turn
            own = [own[0], *own[1:][index % max(1, len(own) - 1) :][:1]]
        members[name] = case, own
    return members


class Way(NamedTuple):
    """How an exchange is made.

    few: with a few rules alone.
    forced: the transport that every matrix takes to which it offers itself, whatever it costs.
    """

    sharding: Sharding
    nonfinite: str = "raise"
    few: bool = False
    forced: str = ""


def ways():
    """As users choose, and by each transport of the registry."""
    small = 0.02
    found = {
        "auto": Way(Sharding(max_buffer_mb=small)),
        "reproducible": Way(Sharding(reproducible=True, max_buffer_mb=small), "skip"),
        "bytes": Way(Sharding(objective="bytes", max_buffer_mb=small), "ignore", few=True),
        "bf16": Way(Sharding("owner", wire="bf16", max_buffer_mb=small), few=True),
    }
    for name in TRANSPORTS:
        choice = name if name in CHOICES else "auto"
        found[name] = Way(Sharding(choice, max_buffer_mb=small), "ignore", forced=name)
    return found


@cache
def draw(name, *words):
    """Gaussian of a shape; depends on all the words. Its first row is long: row caps have work."""
    seed = zlib.crc32("/".join(map(str, (name, *words))).encode())
    shape = SHAPES[name][0] if name in SHAPES else BESIDE[name][0].shape
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if found.dim() > 1:
        found[..., 0, :] *= 10.0
    return found


@cache
def start(name):
    """Weights before they are brought to a manifold."""
    return 0.3 * draw(name, "w")
