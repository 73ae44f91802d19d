"""Our steps beside other people's: torch.optim.Muon, torch.optim.AdamW, and formulas by SVD."""

import math

import pytest
import torch
from torch import nn

from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Polar, Role, Rule, Spectral
from geon.optim.linalg import Precision
from geon.optim.norms import ColNorm, RowNorm, Sign


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_group(rule, weights, lr, role=Role.HIDDEN):
    params = [nn.Parameter(w.clone()) for w in weights]
    infos = [ParamInfo(f"w{i}", tuple(w.shape), role) for i, w in enumerate(weights)]
    optimizer = HybridOptimizer([Group("g", rule, lr, list(zip(infos, params, strict=True)))])
    return optimizer, params


def run(optimizer, params, steps=6, scale=1e-3):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = scale * gauss(p.shape, 100 * step + i)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_muon_is_torch_muon(shape, nesterov):
    weights = [gauss(shape, s) for s in (1, 2)]
    keller = Polar("keller", 5, Precision.BF16)
    rule = Rule(Spectral("muon", keller), momentum=0.95, nesterov=nesterov, decay=0.1)
    ours, mine = one_group(rule, weights, lr=0.02)
    theirs = [nn.Parameter(w.clone()) for w in weights]
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=nesterov, ns_steps=5
    )
    run(ours, mine)
    run(reference, theirs)
    for a, b, start in zip(mine, theirs, weights, strict=True):
        moved = (b - start).norm()
        # bf16 products round at 4e-3; the normalisation differs by our 1% margin.
        assert (a - b).norm() / moved < 0.02


def test_adamw_is_torch_adamw():
    weights = [gauss((7,), 1), gauss((5, 3), 2)]
    ours, mine = one_group(AdamW((0.9, 0.95), 1e-8, 0.1), weights, 0.01, Role.BIAS)
    theirs = [nn.Parameter(w.clone()) for w in weights]
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    run(ours, mine)
    run(reference, theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def lmo_by_formula(kind, d):
    rows, cols = d.shape
    if kind == "spectral":
        u, _, vh = torch.linalg.svd(d.double(), full_matrices=False)
        return math.sqrt(rows / cols) * u @ vh
    if kind == "colnorm":
        return math.sqrt(cols) * d.double() / d.double().norm(dim=1, keepdim=True)
    if kind == "rownorm":
        return d.double() / d.double().norm(dim=1, keepdim=True) / math.sqrt(cols)
    return d.double().sign() / cols


@pytest.mark.parametrize("decay", [0.0, 1.0], ids=["uscion", "scion"])
@pytest.mark.parametrize("kind", ["spectral", "colnorm", "rownorm", "sign"])
def test_scion_is_its_paper(kind, decay):
    """Algorithms 1 and 2 of arXiv 2502.07529 in fp64: x <- (1 - decay lr) x - lr rho lmo(d)."""
    norm = {"colnorm": ColNorm(), "rownorm": RowNorm(), "sign": Sign()}.get(
        kind, Spectral(polar=Polar(steps=16))
    )
    start, lr, rho, alpha = gauss((24, 16), 5), 0.05, 3.0, 0.1
    ours, (mine,) = one_group(Rule(norm, momentum=1 - alpha, radius=rho, decay=decay), [start], lr)
    run(ours, [mine])
    x, d = start.double(), torch.zeros(24, 16, dtype=torch.float64)
    for step in range(6):
        d = (1 - alpha) * d + alpha * 1e-3 * gauss((24, 16), 100 * step).double()
        x = (1 - decay * lr) * x - lr * rho * lmo_by_formula(kind, d)
    assert (mine - x).abs().max() < 2e-5


def test_constrained_scion_stays_in_its_ball():
    rule = Rule(Spectral(), radius=2.0, decay=1.0)
    norm = rule.norm
    start = norm.init((32, 16), torch.Generator().manual_seed(0)) * 2.0
    ours, (w,) = one_group(rule, [start], lr=0.3)
    run(ours, [w], steps=20)
    assert norm.value(w.detach()) <= 2.0 * 1.02


def test_fused_parts_are_stepped_as_separate_matrices():
    parts = [gauss((16, 16), s) for s in range(3)]
    rule = Rule(Spectral(), momentum=0.9)
    apart, separate = one_group(rule, parts, lr=0.1)
    fused = nn.Parameter(torch.cat(parts))
    info = ParamInfo("qkv", (48, 16), Role.HIDDEN, splits=(16, 16, 16))
    together = HybridOptimizer([Group("g", rule, 0.1, [(info, fused)])])
    for step in range(4):
        grads = [gauss((16, 16), 10 * step + i) for i in range(3)]
        for p, g in zip(separate, grads, strict=True):
            p.grad = g.clone()
        fused.grad = torch.cat(grads)
        apart.step()
        together.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in separate]))
    assert together.plan.orthogonalized == 3
