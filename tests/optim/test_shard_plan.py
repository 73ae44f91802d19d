"""Regions, plans and packing, without any process group."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.optim import ParamInfo, Role, Rule, Spectral, Stiefel, matrices_of
from geon.optim.norms import ColNorm, RowNorm, Sign
from geon.optim.shard import ColShard, Region, Replicated, RowShard, Transport, make_plan

LAYOUTS = [RowShard, ColShard]


def matrices(rule, layout, splits=(), name="w"):
    info = ParamInfo(name, layout.shape, Role.HIDDEN, splits)
    return matrices_of(info, "hidden", rule, layout, "shard" if layout.ranks > 1 else "")


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 17), cols=st.integers(1, 17), ranks=st.integers(1, 8))
def test_every_entry_has_one_owner(kind, rows, cols, ranks):
    count = torch.zeros(rows, cols, dtype=torch.int)
    layout = kind((rows, cols), ranks)
    for rank in range(ranks):
        count[layout.region(rank).slices] += 1
    assert (count == 1).all()


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 40), ranks=st.integers(1, 9))
def test_row_shards_are_torch_chunks(length, ranks):
    chunks = [len(c) for c in torch.arange(length).chunk(ranks)]
    chunks += [0] * (ranks - len(chunks))
    layout = RowShard((length, 3), ranks)
    assert [layout.region(r).shape[0] for r in range(ranks)] == chunks


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    ranks=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_parts_of_a_fused_weight_are_found_in_the_local_shards(sizes, ranks, seed):
    """Assembling every part from what the ranks store gives the whole weight back."""
    whole = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    layout = RowShard((sum(sizes), 3), ranks)
    shards = [whole[layout.region(r).slices] for r in range(ranks)]
    rebuilt = []
    for matrix in matrices(Rule(Spectral()), layout, tuple(sizes)):
        part = torch.full(matrix.shape, torch.nan)
        for rank, shard in enumerate(shards):
            start, stop = matrix.local_rows(rank)
            part[matrix.region(rank).slices] = shard[start:stop]
        rebuilt.append(part)
    assert torch.equal(torch.cat(rebuilt), whole)


@pytest.mark.parametrize(
    ("rule", "layout", "expected"),
    [
        (Rule(Sign()), RowShard((8, 4), 4), Transport.LOCAL),
        (Rule(Sign()), ColShard((8, 4), 4), Transport.LOCAL),
        (Rule(ColNorm()), RowShard((9, 4), 4), Transport.LOCAL),
        (Rule(RowNorm()), ColShard((8, 4), 4), Transport.ALLGATHER),
        (Rule(Spectral()), RowShard((8, 4), 4), Transport.ALLGATHER),
        (Rule(Spectral()), Replicated((8, 4)), Transport.LOCAL),
        (Rule(Spectral()), RowShard((8, 4), 1), Transport.LOCAL),
        (Rule(Spectral(), Stiefel()), RowShard((8, 4), 2), Transport.ALLGATHER),
    ],
)
def test_transport_follows_what_must_be_whole(rule, layout, expected):
    plan = make_plan(matrices(rule, layout))
    assert [b.transport for b in plan.buckets] == [expected]


def test_bytes_by_hand():
    """Uneven: 10 rows over 4 ranks are 3, 3, 3, 1; a rank sends its rows to three others."""
    row_bytes, others = 6 * 4, 3
    plan = make_plan(matrices(Rule(Spectral()), RowShard((10, 6), 4)))
    assert plan.totals()["bytes_sent_per_rank"] == [3 * row_bytes * others] * 3 + [
        row_bytes * others
    ]
    both = make_plan(matrices(Rule(Spectral(), Stiefel()), RowShard((10, 6), 4)))
    assert both.bytes_sent(3) == 2 * row_bytes * others


def test_buckets_are_bounded_and_keep_everything():
    rule, layout = Rule(Spectral()), RowShard((256, 256), 4)
    many = [m for i in range(20) for m in matrices(rule, layout, name=f"w{i}")]
    one = make_plan(many[:1]).buckets[0].buffer_bytes()
    plan = make_plan(many, max_buffer_mb=3.5 * one / 2**20)
    assert [len(b.matrices) for b in plan.buckets] == [3] * 6 + [2]
    assert [m.param for m, _ in plan.matrices] == [f"w{i}" for i in range(20)]
    assert all(b.buffer_bytes() <= 3.5 * one for b in plan.buckets)
    alone = make_plan(many, max_buffer_mb=one / 2**21)
    assert len(alone.buckets) == 20


def test_plans_are_deterministic_data():
    rule = Rule(Spectral(), Stiefel())
    build = lambda rows: make_plan(matrices(rule, RowShard((rows, 4), 2), (rows // 2,) * 2))  # noqa: E731
    assert build(8).digest() == build(8).digest() != build(12).digest()
    content = json.loads(json.dumps(build(8).to_dict()))
    assert [row["name"] for row in content["matrices"]] == ["w[0:4]", "w[4:8]"]
    assert content["totals"]["orthogonalized_per_step"] == 2
    assert "2 matrices orthogonalized" in build(8).table()


def test_region_arithmetic():
    region = Region((3, 8), (0, 5))
    assert region.of_part((4, 6)) == Region((0, 2), (0, 5))
    assert region.local_rows((4, 6)) == (1, 3)
    assert region.of_part((8, 9)).numel == 0
    assert region.local_rows((0, 3)) == (0, 0)
