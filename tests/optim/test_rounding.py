"""Momenta that rest in bf16 are rounded by chance: right on average, and alike in every layout."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from geon.errors import UsageError
from geon.optim import HybridOptimizer, rounding
from geon.optim.rounding import DRAWS, Box, first_draw, round_by_chance
from geon.optim.shard import Flat, Grid, Region
from geon.optim.step import view
from tests.optim.contract import STEEPEST, Net, gauss, group, make, same, snap, train

SHAPE = (24, 40)


def rounded(average, times, name="w"):
    held = torch.empty(average.shape, dtype=torch.bfloat16)
    region = Region((0, average.shape[0]), (0, average.shape[1]))
    draws = first_draw(name, held.device) + times
    round_by_chance([Box(draws, region, average.clone(), held)])
    return held


def neighbours(average):
    """The numbers of bf16 beside, towards zero and away from it, in fp64."""
    bits = average.view(torch.int32)
    inner = (bits & ~0xFFFF).view(torch.float32)
    return inner.double(), (inner.view(torch.int32) + 0x10000).view(torch.float32).double()


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-40, 1e30])
def test_the_mean_of_many_roundings_is_what_was_rounded(size):
    """By the odds of a fair draw: each entry within six standard errors, all of them within one."""
    average, count = size * gauss(SHAPE, 1), 2000
    inner, outer = neighbours(average)
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for times in range(count):
        held = rounded(average, times).double()
        assert ((held == inner) | (held == outer)).all()
        total += held
    share = (average.double() - inner) / (outer - inner)
    error = (total / count - average.double()) / (outer - inner)
    spread = (share * (1 - share) / count).sqrt() + 1 / count
    assert (error.abs() <= 6 * spread).all()
    assert (error / spread).square().mean() <= 1.2
    assert error.mean().abs() <= 4 * spread.square().sum().sqrt() / error.numel()


def test_numbers_of_bf16_infinities_and_nan_stay():
    gpu_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    plain = torch.tensor([0.0, -0.0, 1.0, -3.0, float("inf"), -float("inf"), float("nan"), 1e-40])
    plain = torch.cat([plain.bfloat16().float(), gpu_nan])[None]
    for times in range(20):
        held = rounded(plain, times)
        assert torch.equal(held[:, :6].float(), plain[:, :6])
        assert held[0, 7] == plain[0, 7]
        assert held[0, [6, 8]].isnan().all()


def test_chance_is_white_between_steps_parameters_and_entries():
    """Halves of a last digit: draws correlate with nothing, and no direction stands out."""
    half = torch.full((192, 256), 1.0 + 2.0**-8)
    first, later, other = (
        (rounded(half, times, name).double() - half) * 2**8
        for times, name in ((0, "w"), (1, "w"), (0, "v"))
    )
    assert first.unique().tolist() == [-1.0, 1.0]
    most = 5 / half.numel() ** 0.5
    shifted = [first.roll(1, 0), first.roll(1, 1), first.flip(0), first[:192, :192].T]
    pairs = [later, other, *shifted]
    for one in pairs:
        own = first[:, : one.shape[1]]
        assert (own * one).mean().abs() <= most * (first.numel() / own.numel()) ** 0.5
    # The largest singular value of signs that are drawn independently.
    edge = 192**0.5 + 256**0.5
    assert torch.linalg.matrix_norm(first, 2) == pytest.approx(edge, rel=0.06)


@pytest.mark.parametrize(
    "layout",
    [
        Grid.rows(SHAPE, 5),
        Grid.cols(SHAPE, 3),
        Grid(SHAPE, (2, 2), ((1, 1), (0, 0))),
        Flat(SHAPE, 7, 139),
        Grid((4, 6, 40), (3,), ((0, 1),)),
    ],
)
def test_pieces_are_rounded_as_the_whole_is(layout):
    average = gauss(SHAPE, 3)
    whole = rounded(average, 9)
    seen = torch.zeros(SHAPE)
    for rank in range(layout.ranks):
        for piece in layout.pieces(rank):
            stored = torch.full((1 + sum(p.region.numel for p in layout.pieces(rank)),), 7.0)
            held = stored.bfloat16()
            mine, rests = view(stored, piece), view(held, piece)
            mine.copy_(average[piece.region.slices])
            round_by_chance([Box(first_draw("w", held.device) + 9, piece.region, mine, rests)])
            assert torch.equal(rests, whole[piece.region.slices])
            assert held[-1] == 7.0
            seen[piece.region.slices] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("most", [rounding.MOST, 2000, 1])
def test_what_is_rounded_together_is_rounded_as_alone(most, monkeypatch):
    monkeypatch.setattr(rounding, "MOST", most)
    shapes = [SHAPE, (7, 5), SHAPE, (5, 7), SHAPE, (1, 9)]
    averages = [gauss(shape, i) for i, shape in enumerate(shapes)]
    boxes = [
        Box(
            first_draw(f"w{i}", average.device) + i,
            Region((0, average.shape[0]), (0, average.shape[1])),
            average.clone(),
            torch.empty(average.shape, dtype=torch.bfloat16),
        )
        for i, average in enumerate(averages)
    ]
    round_by_chance(boxes)
    for i, (box, average) in enumerate(zip(boxes, averages, strict=True)):
        assert torch.equal(box.held, rounded(average, i, f"w{i}"))
        assert torch.equal(box.average, average)
    round_by_chance([])


def test_torchs_generator_is_left_alone():
    before = torch.random.get_rng_state()
    rounded(gauss(SHAPE), 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_rounding_neither_waits_for_a_device_nor_sends_anything_there():
    """What a CUDA graph cannot capture: values read by the host, and tensors made of its values."""
    found = set()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.add(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    with Watched():
        rounded(gauss(SHAPE), 3)
    assert {"arange", "mul", "_foreach_copy_"} <= found
    assert not found & {"_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"}


def test_parameters_that_coast_are_rounded_too():
    net = Net("muon")
    optimizer = HybridOptimizer([group(net, idle="coast")], momentum=torch.bfloat16)
    train(net, optimizer, [0])
    before = snap(net, optimizer)
    train(net, optimizer, [1], names="a")
    after = snap(net, optimizer)
    assert after["b.draws"] == before["b.draws"] + 1
    torch.testing.assert_close(after["b.momentum"], 0.95 * before["b.momentum"], rtol=0.02, atol=0)


def test_a_momentum_follows_gradients_that_rounding_to_nearest_loses():
    """Gradients shrink by a factor of 0.999 a step: to nearest, a momentum stays behind them."""
    net, optimizer = make("muon", momentum=torch.bfloat16)
    exact = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in net.named_parameters()}
    stays = {n: torch.zeros_like(p, dtype=torch.bfloat16) for n, p in net.named_parameters()}
    base = {n: gauss(p.shape, 5) for n, p in net.named_parameters()}
    for step in range(300):
        for name, param in net.named_parameters():
            param.grad = base[name] * 0.999**step
            exact[name].lerp_(param.grad.double(), 0.05)
            stays[name] = stays[name].float().lerp(param.grad, 0.05).bfloat16()
        optimizer.step()
    for name, param in net.named_parameters():
        truth = exact[name]
        held = optimizer.state[param]["momentum"]
        assert optimizer.state[param][DRAWS] == first_draw(name, param.device) + 300
        ours, theirs = (
            ((m - truth) * truth).sum() / truth.square().sum() for m in (held, stays[name])
        )
        assert theirs.abs() > 0.01
        assert ours.abs() < 0.003


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("kind", STEEPEST)
def test_copies_go_on_to_the_last_bit(kind, way):
    net, optimizer = make(kind, momentum=torch.bfloat16)
    train(net, optimizer, range(2))
    if way == "state_dict":
        twin, other = make(kind, momentum=torch.bfloat16)
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "deepcopy":
        twin, other = copy.deepcopy((net, optimizer))
    else:
        twin, other = pickle.loads(pickle.dumps((net, optimizer)))
    train(net, optimizer, range(2, 5))
    train(twin, other, range(2, 5))
    assert same(snap(net, optimizer), snap(twin, other))
    assert other.state_tensors()["a.draws"] == first_draw("a", torch.device("cpu")) + 5


def test_momenta_change_their_dtype_where_they_are_loaded():
    """Those of fp32, and those of bf16 from before roundings were counted, begin anew."""
    net, optimizer = make("muon")
    train(net, optimizer, [0])
    _, half = make("muon", momentum=torch.bfloat16)
    half.load_state_dict(optimizer.state_dict())
    assert half.state_tensors()["a.draws"] == first_draw("module.a", torch.device("cpu"))
    _, back = make("muon")
    back.load_state_dict(half.state_dict())
    assert set(back.state_tensors()) == {"a.momentum", "b.momentum"}
    assert torch.equal(
        back.state_tensors()["a.momentum"].bfloat16(), half.state_tensors()["a.momentum"]
    )


def test_a_step_that_is_left_out_draws_nothing():
    net, optimizer = make("muon", momentum=torch.bfloat16, nonfinite="skip")
    train(net, optimizer, [0])
    kept = snap(net, optimizer)
    net.a.grad = torch.full_like(net.a, float("nan"))
    optimizer.step()
    assert same(kept, snap(net, optimizer))


def test_other_dtypes_are_refused():
    with pytest.raises(
        UsageError, match=r"momentum=torch.float16: momenta rest in torch.float32 or"
    ):
        HybridOptimizer([group(Net("muon"))], momentum=torch.float16)
