"""Matrices to solve for, and how a direction is judged: by plain SVD and eigh in float64.

A lower bound of the optimum from the feasible part of a direction, an upper bound from weak
duality.
"""

import math
from functools import cache

import torch

from geon.optim import Polar, Spectral, Stiefel, polar_svd
from geon.optim.linalg import Precision, orient
from geon.optim.solvers import Ladder, steepest
from geon.optim.solvers.exact import certified_optimum

STIEFEL = Stiefel()
BF16 = Polar(precision=Precision.BF16)
FORMS = {
    "gram": Ladder(form="gram"),
    "gram x3": Ladder(form="gram", precision=Precision.BF16X3),
    "rect": Ladder(form="rect"),
    "rect bf16": Ladder(form="rect"),
    "rect bf16 x3": Ladder(form="rect", precision=Precision.BF16X3),
    "oneshot": Ladder("oneshot"),
}
LONGEST = {
    "gram": 1.001,
    "gram x3": 1.005,
    "rect": 1.003,
    "rect bf16": 1.01,
    "rect bf16 x3": 1.01,
    "oneshot": 2 / math.sqrt(3) * 1.005,
}


# bf16x3 products err by 5e-6 of their length, in the last projection too.
LEAST_TANGENT = dict.fromkeys(FORMS, 1e-5) | {"gram x3": 3e-5, "rect bf16 x3": 3e-5}


def gauss(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def point(shape, seed=1):
    """Seeds apart from those of `gauss`: the polar factor of G is a point where G is normal."""
    return STIEFEL.random_point(shape, torch.Generator().manual_seed(seed + 1000))


def with_spectrum(shape, seed, values):
    u, s, vh = torch.linalg.svd(gauss(shape, seed).double(), full_matrices=False)
    i = torch.arange(len(s), dtype=torch.float64) / len(s)
    return ((u * values(i)) @ vh).float()


def spike(shape, seed):
    """Spectrum 60 exp(-40 i/n) + 0.2 + 1.6 (1 - i/n): the shape of real momentum."""
    return with_spectrum(shape, seed, lambda i: 60 * torch.exp(-40 * i) + 0.2 + 1.6 * (1 - i))


def of_rank(k):
    return lambda shape, seed: gauss((shape[0], k), seed) @ gauss((k, shape[1]), seed + 1)


def symmetric(n, seed, rank):
    x = gauss((n, n), seed)
    return x + x.mT if rank is None else x[:, :rank] @ x[:, :rank].mT


def normal(shape, seed, rank=None, noise=0.0):
    """U S, normal to the manifold at the point of this seed, and noise."""
    u = orient(point(shape, seed))
    g = u @ symmetric(u.shape[-1], seed, rank) + noise * gauss(u.shape, seed + 1)
    return g if shape[0] >= shape[1] else g.mT


def in_span(shape, seed):
    """U B: no part across U."""
    u = orient(point(shape, seed))
    g = u @ gauss((u.shape[-1],) * 2, seed)
    return g if shape[0] >= shape[1] else g.mT


SPECTRA = {
    "gauss": gauss,
    "spike": spike,
    "decay 1e-4": lambda shape, seed: with_spectrum(shape, seed, lambda i: 10 ** (-4 * i)),
    "decay 1e-8": lambda shape, seed: with_spectrum(shape, seed, lambda i: 10 ** (-8 * i)),
    "flat": lambda shape, seed: with_spectrum(shape, seed, torch.ones_like),
    "rank 1": of_rank(1),
    "rank 4": of_rank(4),
}
NORMAL = {
    "nearly normal": lambda shape, seed: normal(shape, seed, noise=1e-3),
    "normal": normal,
    "normal rank 1": lambda shape, seed: normal(shape, seed, rank=1),
    "in the span": in_span,
    "the weight": lambda shape, seed: point(shape, seed),
}
SCALES = (1e-30, 1e-12, 1.0, 1e12, 1e30)
SHAPES = [(32, 32), (33, 33), (1, 1), (8, 1), (5, 4), (17, 16), (34, 32), (21, 17), (40, 32)]
SHAPES += [(48, 32), (64, 32), (32, 96), (128, 32), (16, 256)]


def solve(form, grad, weight, refine=0):
    """Solution at unit norm, tall."""
    norm = Spectral(polar=BF16 if "bf16" in form else Polar())
    ladder = FORMS[form]
    ladder = Ladder(ladder.method, refine, ladder.form, ladder.precision)
    found = steepest(norm, STIEFEL, ladder)(grad, weight)
    return found._replace(direction=orient(found.direction) / norm.factor(grad.shape))


def sym(x):
    return (x + x.mT) / 2


def skew(x):
    return (x - x.mT) / 2


def spectral_norm(a):
    return torch.linalg.matrix_norm(a, 2)


def tangency(u, a):
    u, a = u.double(), a.double()
    return 2 * torch.linalg.matrix_norm(sym(u.mT @ a)) / math.sqrt(u.shape[-1])


@cache
def problem(spectrum, shape, seed=0):
    """(weight, gradient, exact U, upper bound of <G, A> by weak duality)."""
    weight, grad = point(shape, seed), {**SPECTRA, **NORMAL}[spectrum](shape, seed)
    u, g = polar_svd(orient(weight)), orient(grad).double()
    multiplier = sym(certified_optimum(u, g).multiplier)
    return weight, grad, u, torch.linalg.matrix_norm(g + u @ multiplier, "nuc").item()


def rho(form, spectrum, shape, seed=0, refine=0):
    """Share of the optimum that the feasible part of a direction attains; at least this."""
    weight, grad, u, upper = problem(spectrum, shape, seed)
    a = solve(form, grad, weight, refine).direction.double()
    a = a - u @ sym(u.mT @ a)
    return (orient(grad).double() * a).sum().item() / max(1.0, spectral_norm(a).item()) / upper
