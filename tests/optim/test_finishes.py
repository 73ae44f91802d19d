"""Finishes of a step: each beside its formula in float64, alone and in whole steps."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geon.optim import FINISHES, Group, HybridOptimizer, ParamInfo, Polar, Role, Rule, Spectral
from geon.optim.finishes import (
    CautiousDecay,
    EvenRows,
    Move,
    RadialBrake,
    RowCap,
    RowMoments,
    UpdateFloor,
)
from geon.optim.manifolds import SpectralBall
from geon.optim.norms import ColNorm, Reach, Sign

LR, RADIUS, DECAY = 0.05, 2.0, 0.1
SHAPES = [(12, 5), (5, 12), (8, 8)]


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def move(shape, lr=LR, length=1.0, decay=0.0, extent=1.0):
    return Move(lr, length, decay, shape, extent)


def uneven(shape, seed, blank=0):
    """Rows of lengths over four decades; the first `blank` are zero."""
    d = gauss(shape, seed) * 10.0 ** (2 * gauss((shape[0], 1), seed + 1)).clamp(-2, 2)
    d[:blank] = 0
    return d


sizes = {
    "rows": st.integers(1, 12),
    "cols": st.integers(1, 12),
    "seed": st.integers(0, 10**6),
}
every_shape = settings(max_examples=50, deadline=None)


# Formulas, in float64: of a direction d, at a weight w, for a step of `length` at lr 1.


def even_rows(d):
    lengths = [row.square().sum().sqrt().item() for row in d]
    mean = math.sqrt(sum(x * x for x in lengths) / len(lengths))
    return torch.stack([row * (mean / x if x else 0.0) for row, x in zip(d, lengths, strict=True)])


def row_moments(d, v, kept):
    """Directions and the running mean squares (NorMuon, algorithm 1)."""
    v = kept * v + (1 - kept) * d.square().sum(1) / d.shape[1]
    out = torch.stack([row / x.sqrt() if x else 0 * row for row, x in zip(d, v, strict=True)])
    size = out.square().sum().sqrt()
    return (out * d.square().sum().sqrt() / size if size else out), v


def row_cap(d, most, extent):
    bound = most * extent / math.sqrt(len(d))
    return torch.stack([row * min(1.0, bound / (row.norm().item() or bound)) for row in d])


def update_floor(d, w, least, length):
    step = length * d.norm().item()
    return d * max(1.0, least * w.norm().item() / step) if step else d


def cautious(d, w, decay, length):
    return d + decay / length * torch.where(d * w > 0, w, torch.zeros_like(w))


def braked(w, moved, outward, inward):
    """The step's part across w as it is, a share of the part along it; then the norm is set."""
    size = w.norm()
    if not size:
        return moved
    unit, step = w / size, moved - w
    along = (unit * step).sum()
    kept = along * (outward if along > 0 else inward)
    found = w + (step - along * unit) + kept * unit
    return found * ((size + kept).abs() / found.norm())


# Each alone.


@every_shape
@given(**sizes, blank=st.integers(0, 3))
def test_even_rows(rows, cols, seed, blank):
    d = uneven((rows, cols), seed, blank)
    found = EvenRows().direct(d, None, move((rows, cols)))
    torch.testing.assert_close(found, even_rows(d.double()).float(), rtol=1e-5, atol=1e-30)
    assert not found[:blank].any()
    assert found.norm() <= d.norm() * (1 + 1e-5)


@every_shape
@given(**sizes, blank=st.integers(0, 3), kept=st.sampled_from([0.0, 0.5, 0.95]))
def test_second_moments(rows, cols, seed, blank, kept):
    """Over steps: a row that has been zero from the start stays so."""
    state, v = torch.zeros(rows), torch.zeros(rows).double()
    for step in range(4):
        d = uneven((rows, cols), seed + 7 * step, blank)
        before = state.clone()
        found, state = RowMoments(kept).direct_with(d, state)
        wanted, v = row_moments(d.double(), v, kept)
        torch.testing.assert_close(state, v.float(), rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-30)
        assert not found[:blank].any()
        assert state is not before
        torch.testing.assert_close(found.norm(), d.norm())


@every_shape
@given(**sizes, blank=st.integers(0, 3), most=st.floats(0.1, 10.0), extent=st.floats(0.1, 10.0))
def test_row_cap(rows, cols, seed, blank, most, extent):
    d, shape = uneven((rows, cols), seed, blank), (rows, cols)
    found = RowCap(most).direct(d, None, move(shape, extent=extent))
    wanted = row_cap(d.double(), most, extent).float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30)
    assert found.norm(dim=1).max() <= most * extent / math.sqrt(rows) * (1 + 1e-5)
    part = slice(rows // 3, rows // 3 + 2)  # rows are enough, when they know the whole shape
    assert torch.equal(RowCap(most).direct(d[part], None, move(shape, extent=extent)), found[part])


@every_shape
@given(**sizes, least=st.floats(0.1, 2.0), length=st.floats(0.1, 10.0), size=st.floats(-3, 3))
def test_update_floor(rows, cols, seed, least, length, size):
    d, w = gauss((rows, cols), seed), 10.0**size * gauss((rows, cols), seed + 1)
    found = UpdateFloor(least).direct(d, w, move((rows, cols), length=length))
    wanted = update_floor(d.double(), w.double(), least, length).float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert length * found.norm() >= least * w.norm() * (1 - 1e-5)
    assert found.norm() >= d.norm() * (1 - 1e-6)
    zero = torch.zeros(rows, cols)
    assert torch.equal(UpdateFloor(least).direct(zero, w, move((rows, cols))), zero)


@every_shape
@given(
    **sizes,
    outward=st.sampled_from([0.0, 0.5, 1.0]),
    inward=st.sampled_from([0.0, 0.3, 1.0]),
    step=st.floats(-3, 0.5),
    lean=st.floats(-3, 3),
)
def test_radial_brake(rows, cols, seed, outward, inward, step, lean):
    """Steps that lean outwards and inwards, up to three times the weight."""
    w = gauss((rows, cols), seed)
    moved = w + 10.0**step * (gauss((rows, cols), seed + 1) + lean * w)
    found = RadialBrake(outward, inward).settle(w, moved)
    wanted = braked(w.double(), moved.double(), outward, inward).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * max(1.0, float(moved.norm())))
    along = ((moved - w) * w).sum() / w.norm()
    if outward == inward == 0:
        torch.testing.assert_close(found.norm(), w.norm(), rtol=1e-5, atol=0)
    if outward == inward == 1:  # first order alone, in the direction of the step
        torch.testing.assert_close(found.norm(), (w.norm() + along).abs(), rtol=1e-3, atol=1e-3)
    zero = torch.zeros(rows, cols)
    assert torch.equal(RadialBrake(outward, inward).settle(zero, moved), moved)
    assert torch.equal(RadialBrake(outward, inward).settle(w, w), w)


@every_shape
@given(**sizes, decay=st.floats(0.01, 1.0), length=st.floats(0.1, 10.0))
def test_cautious_decay(rows, cols, seed, decay, length):
    d, w = gauss((rows, cols), seed), gauss((rows, cols), seed + 1)
    d[0], w[-1] = 0, 0
    found = CautiousDecay().direct(d, w, move((rows, cols), length=length, decay=decay))
    wanted = cautious(d.double(), w.double(), decay, length).float()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[d * w <= 0], d[d * w <= 0])


@pytest.mark.parametrize("name", sorted(FINISHES))
def test_batches_are_finished_one_by_one_and_nothing_is_written_into(name):
    finish, shape = FINISHES[name](), (9, 6)
    d = torch.stack([uneven(shape, s, blank=s) for s in range(3)])
    w, rows = torch.stack([gauss(shape, 10 + s) for s in range(3)]), gauss((3, 9), 20).square()
    w[2] = 0
    kept = [x.clone() for x in (d, w, rows)]
    one = move(shape, length=0.3, decay=DECAY, extent=2.0)

    def finished(d, w, rows):
        if finish.row_state:
            return finish.direct_with(d, rows)
        return finish.direct(d, w, one), finish.settle(w, w - 0.1 * d)

    together = finished(d, w, rows)
    for i in range(3):
        for whole, single in zip(together, finished(d[i], w[i], rows[i]), strict=True):
            torch.testing.assert_close(whole[i], single)
    assert all(torch.equal(a, b) for a, b in zip(kept, (d, w, rows), strict=True))


# In whole steps.

CASES = {
    "even_rows": EvenRows(),
    "second_moment": RowMoments(0.9),
    "row_cap": RowCap(0.9),
    "update_floor": UpdateFloor(3.0),
    "radial_brake": RadialBrake(0.3, 0.7),
    "cautious_decay": CautiousDecay(),
}
CHAINS = {
    **{name: (finish,) for name, finish in CASES.items()},
    "even rows, then a floor and a brake": (EvenRows(), UpdateFloor(3.0), RadialBrake()),
    "cautious, then a cap": (CautiousDecay(), RowCap(0.9)),
    "moments, then cautious": (RowMoments(0.9), CautiousDecay()),
    "a brake, then cautious": (RadialBrake(0.0, 1.0), CautiousDecay()),
}


def by_formula(finishes, start, grads, decay, lr=LR):
    """Weights after each step of Muon with these finishes, in float64."""
    w, m = start.double(), torch.zeros_like(start).double()
    v, shape = torch.zeros(len(start)).double(), start.shape
    factor, seen = math.sqrt(shape[0] / shape[1]), []
    for grad in grads:
        m = 0.9 * m + 0.1 * grad.double()
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        d, own, brakes = factor * u @ vh, decay, []
        for finish in finishes:
            match finish:
                case EvenRows():
                    d = even_rows(d)
                case RowMoments(kept):
                    d, v = row_moments(d, v, kept)
                case RowCap(most):
                    d = row_cap(d, most, factor * math.sqrt(min(shape)))
                case UpdateFloor(least):
                    d = update_floor(d, w, least, RADIUS)
                case CautiousDecay():
                    d, own = cautious(d, w, decay, RADIUS), 0.0
                case RadialBrake(outward, inward):
                    brakes.append((outward, inward))
        moved = (1 - lr * own) * w - lr * RADIUS * d
        for shares in brakes:
            moved = braked(w, moved, *shares)
        w = moved
        seen.append(w)
    return seen


def optimizer_of(param, finishes, decay=DECAY, lr=LR, **options):
    norm = Spectral(polar=Polar(steps=14))
    rule = Rule(norm, momentum=0.9, radius=RADIUS, decay=decay, finishes=finishes)
    info = ParamInfo("w", tuple(param.shape), Role.HIDDEN)
    return HybridOptimizer([Group("g", rule, lr, [(info, param)])], **options)


def test_every_finish_is_tested():
    assert set(CASES) == set(FINISHES)
    assert all(isinstance(CASES[name], FINISHES[name]) for name in FINISHES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chain", list(CHAINS))
def test_steps_are_their_formulas(chain, shape):
    finishes = CHAINS[chain]
    param, grads = nn.Parameter(gauss(shape, 1)), [gauss(shape, s) for s in range(2, 7)]
    start = param.detach().clone()
    optimizer, plain = optimizer_of(param, finishes), by_formula((), start, grads, DECAY)
    wanted = by_formula(finishes, start, grads, DECAY)
    if shape[0] > shape[1]:  # the rows of other polar factors are even from the start
        assert (wanted[-1] - plain[-1]).norm() > 0.02 * (plain[-1] - start).norm()
    for grad, w in zip(grads, wanted, strict=True):
        param.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(param.detach(), w.float(), atol=3e-4, rtol=0)


@pytest.mark.parametrize("chain", list(CHAINS))
def test_steps_of_bf16_weights_are_those_of_fp32_ones_to_rounding(chain):
    shape, moved = (12, 8), []
    start = gauss(shape, 1).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        param = nn.Parameter(start.to(dtype, copy=True))
        param.grad = gauss(shape, 2).to(dtype)
        optimizer_of(param, CHAINS[chain], lr=0.3).step()
        assert param.dtype == dtype
        moved.append(param.detach().float() - start.float())
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()


@pytest.mark.parametrize("chain", list(CHAINS))
def test_heads_are_finished_each_by_itself_at_their_scale(chain):
    """Beside the same blocks as parameters of their own, in units of the whole matrix's scale."""
    finishes, lr, decay = CHAINS[chain], 0.1, DECAY
    whole, scale = nn.Parameter(gauss((12, 12), 1)), 3**0.5
    rule = Rule(Spectral(), momentum=0.9, radius=RADIUS, decay=decay, finishes=finishes)
    info = ParamInfo("q", (12, 12), Role.HIDDEN, heads=3)
    together = HybridOptimizer([Group("g", rule, lr, [(info, whole)], per_head=True)])
    blocks = [nn.Parameter(b.clone() / scale) for b in whole.detach().split(4)]
    infos = [ParamInfo(f"q{i}", (4, 12), Role.HIDDEN) for i in range(3)]
    apart = HybridOptimizer([Group("g", rule, lr, list(zip(infos, blocks, strict=True)))])
    for step in range(3):
        whole.grad = gauss((12, 12), 10 + step)
        for block, grad in zip(blocks, whole.grad.split(4), strict=True):
            block.grad = grad.clone()
        together.step()
        apart.step()
    found = torch.cat([b.detach() * scale for b in blocks])
    torch.testing.assert_close(whole.detach(), found, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("chain", [c for c in CHAINS if "cautious" not in c])
def test_zero_gradients_move_nothing(chain):
    """Cautious decay needs decay, and that of a direction of zero is none."""
    param = nn.Parameter(gauss((12, 8), 1))
    start = param.detach().clone()
    optimizer = optimizer_of(param, CHAINS[chain], decay=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, start)


def test_cautious_decay_of_no_direction_is_none():
    param = nn.Parameter(gauss((12, 8), 1))
    start = param.detach().clone()
    optimizer = optimizer_of(param, (CautiousDecay(),))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, start)


def test_a_rule_asks_for_as_much_as_its_finishes():
    """Entry-wise ones at the end of the chain run where weights are written: nothing is sent."""

    def asked(norm, *finishes):
        rule = Rule(norm, decay=DECAY, finishes=finishes)
        return rule.reach, rule.needs_weight, rule.row_states

    assert asked(Sign()) == (Reach.ENTRY, False, ())
    assert asked(Sign(), CautiousDecay()) == (Reach.ENTRY, False, ())
    assert asked(ColNorm(), RowCap(), CautiousDecay()) == (Reach.ROW, False, ())
    assert asked(ColNorm(), CautiousDecay(), RowCap()) == (Reach.ROW, True, ())
    assert asked(Sign(), UpdateFloor()) == (Reach.MATRIX, True, ())
    assert asked(Sign(), RadialBrake(), CautiousDecay()) == (Reach.MATRIX, True, ())
    assert asked(Spectral(), RowMoments()) == (Reach.MATRIX, False, ("second_moment",))
    assert asked(Spectral(), EvenRows()) == (Reach.MATRIX, False, ())


def test_shorthands_are_finishes():
    ball = SpectralBall()
    assert Rule(Spectral(), ball, even_rows=True) == Rule(Spectral(), ball, finishes=(EvenRows(),))
    short = Rule(Spectral(), ball, second_moment=0.9)
    assert short == Rule(Spectral(), ball, finishes=(RowMoments(0.9),))
    assert short != Rule(Spectral(), ball, finishes=(RowMoments(0.8),))
    last = Rule(Spectral(), ball, finishes=(RowCap(),), even_rows=True)
    assert last.finishes == (RowCap(), EvenRows())
    assert pickle.loads(pickle.dumps(last)) == last
    assert "row cap 2, even rows" in last.describe()
