"""The lower bound, by ranks of Jacobians; and how far plans are from it, for every shape and P."""

import itertools

import pytest
import torch

from geon.optim import ParamInfo, Role, Rule, Spectral, Stiefel, matrices_of
from geon.optim.shard import Flat, Grid, Region, Sharding, holding, lower_bound_words, make_plan

BYTES = Sharding(objective="bytes")


def matrix(layout, rule=None):
    info = ParamInfo("w", layout.shape, Role.HIDDEN)
    return matrices_of(info, "g", rule or Rule(Spectral()), layout)[0]


def words_sent(job):
    """Over all ranks, each way."""
    return sum(count for message in (*job.down, *job.up) for count, _ in message.words)


def reachable(shape, own):
    """Dimension of the polar factor's own entries, over all values of the others' entries."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[own] = True

    def out(others):
        whole = x.clone()
        whole[~mask] = others
        u, _, vh = torch.linalg.svd(whole, full_matrices=False)
        return (u @ vh)[mask]

    jacobian = torch.autograd.functional.jacobian(out, x[~mask])
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-9))


@pytest.mark.parametrize("shape", [(8, 3), (9, 4), (6, 6), (3, 8), (4, 9)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("cut", [Grid.rows, Grid.cols], ids=["rows", "cols"])
def test_the_bound_is_the_dimension_of_what_a_rank_must_learn(shape, ranks, cut):
    layout = cut(shape, ranks)
    total = 0
    for rank in range(ranks):
        for piece in layout.pieces(rank):
            total += reachable(shape, piece.region.slices)
    held = holding(layout, Region((0, shape[0]), (0, shape[1])))
    assert lower_bound_words(held) == pytest.approx(total / ranks)


@pytest.mark.parametrize("shape", [(8, 4), (6, 6), (4, 8)])
def test_the_bound_of_boxes_is_not_above_what_a_rank_must_learn(shape):
    layout = Grid(shape, (2, 2), ((0, 0), (1, 1)))
    total = sum(reachable(shape, p.region.slices) for r in range(4) for p in layout.pieces(r))
    held = holding(layout, Region((0, shape[0]), (0, shape[1])))
    assert lower_bound_words(held) <= total / 4 + 1e-9


def test_nothing_is_needed_of_what_is_whole_and_flat_runs_have_no_bound():
    box = Region((0, 8), (0, 4))
    assert lower_bound_words(holding(Grid.whole((8, 4), 4), box)) == 0
    assert lower_bound_words(holding(Flat((8, 4), 3, 11), box)) is None


# From 2 on: of a single column, the scale is as long as the Gram, which makes 3 words of 1.
SIDES = [2, 3, 4, 5, 6, 8, 12, 16, 24, 33, 48, 64]


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 6, 7, 8, 16, 64])
def test_words_of_auto_are_within_eight_thirds_of_the_bound_for_every_shape(ranks):
    """Shards along the long side, as FSDP2 has them by default here where columns divide."""
    worst = 0.0
    for short, long in itertools.product(SIDES, [*SIDES, 100, 256, 1000]):
        if long < short:
            continue
        plan = make_plan([matrix(Grid.rows((long, short), ranks))], BYTES)
        bound = plan.lower_bound_words()
        words = sum(words_sent(job) for job in plan.jobs) / ranks
        if bound:
            worst = max(worst, words / bound)
        else:
            assert words == 0
    assert worst <= 8 / 3


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_shards_along_the_short_side_are_within_twice_the_bound(ranks):
    for short, long in [(8, 8), (8, 16), (16, 64), (24, 100), (64, 256)]:
        plan = make_plan([matrix(Grid.rows((short, long), ranks))], Sharding("owner"))
        words = sum(words_sent(job) for job in plan.jobs) / ranks
        assert words <= 2 * plan.lower_bound_words() * (1 + 1e-9)


def test_words_are_bytes_when_all_words_are_fp32():
    for rule in (Rule(Spectral()), Rule(Spectral(), Stiefel())):
        for transport in ("owner", "gram"):
            for layout in (Grid.rows((40, 8), 4), Grid((40, 8), (2, 2), ((1, 0),))):
                plan = make_plan([matrix(layout, rule)], Sharding(transport))
                assert sum(plan.bytes_sent) == 4 * sum(words_sent(job) for job in plan.jobs)
