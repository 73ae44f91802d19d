"""Regions, plans and packing, without any process group."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.errors import UsageError
from geon.optim import MANIFOLDS, ParamInfo, Role, Rule, Spectral, Stiefel, matrices_of
from geon.optim.norms import ColNorm, RowNorm, Sign
from geon.optim.shard import (
    Bucket,
    ColShard,
    Exchange,
    Region,
    Replicated,
    RowShard,
    Transport,
    make_plan,
)
from geon.optim.shard.exchange import _unpack

LAYOUTS = [RowShard, ColShard]


def matrices(rule, layout, splits=(), name="w", heads=0, axis=0):
    """Of one weight: its parts, or with heads their blocks."""
    info = ParamInfo(name, layout.shape, Role.HIDDEN, splits, heads, axis)
    group = "shard" if layout.ranks > 1 else ""
    return matrices_of(info, "hidden", rule, layout, group, per_head=heads > 0)


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
            part[matrix.region(rank).slices] = shard[matrix.local(rank).slices]
        rebuilt.append(part)
    assert torch.equal(torch.cat(rebuilt), whole)


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=300, deadline=None)
@given(
    heads=st.integers(1, 5),
    size=st.integers(1, 3),
    other=st.integers(1, 7),
    parts=st.integers(1, 3),
    axis=st.integers(0, 1),
    ranks=st.integers(1, 8),
)
def test_every_entry_lies_in_one_region_of_one_head(kind, heads, size, other, parts, axis, ranks):
    """Regions and places in the shards agree, uneven and empty shards included."""
    part = (heads * size, other) if axis == 0 else (other, heads * size)
    layout = kind((parts * part[0], part[1]), ranks)
    whole = torch.arange(float(layout.shape[0] * layout.shape[1])).view(layout.shape)
    shards = [whole[layout.region(r).slices] for r in range(ranks)]
    count = torch.zeros(layout.shape, dtype=torch.int)
    found = matrices(Rule(Spectral()), layout, (part[0],) * parts, heads=heads, axis=axis)
    assert len(found) == heads * parts
    for matrix in found:
        assert matrix.shape == ((size, other) if axis == 0 else (other, size))
        block = whole[matrix.box.slices]
        for rank, shard in enumerate(shards):
            region, place = matrix.region(rank), matrix.local(rank)
            if region.numel:
                assert torch.equal(block[region.slices], shard[place.slices])
            assert shard[place.slices].numel() == region.numel
            count[matrix.box.slices][region.slices] += 1
    assert (count == 1).all()
    # What the ranks would send, one after the other, unpacks to the blocks.
    sent = [s[m.local(r).slices].reshape(-1) for r, s in enumerate(shards) for m in found]
    unpacked = _unpack(Bucket(Transport.ALLGATHER, "shard", ranks, tuple(found)), torch.cat(sent))
    for matrix, (block,) in zip(found, unpacked, strict=True):
        assert torch.equal(block, whole[matrix.box.slices])


@pytest.mark.parametrize(
    ("splits", "axis", "names"),
    [
        ((), 0, ["w[0:2]", "w[2:4]", "w[4:6]", "w[6:8]"]),
        ((), 1, ["w[:, 0:2]", "w[:, 2:4]", "w[:, 4:6]", "w[:, 6:8]"]),
        ((4, 4), 1, [f"w[{r}, {c}]" for r in ("0:4", "4:8") for c in ("0:2", "2:4", "4:6", "6:8")]),
    ],
)
def test_names_show_what_is_a_part(splits, axis, names):
    found = matrices(Rule(Spectral()), Replicated((8, 8)), splits, heads=4, axis=axis)
    assert [m.name for m in found] == names


def test_head_blocks_are_counted_and_printed_as_matrices():
    """12 blocks of rows and 12 of columns, each kind one line, all in one bucket."""
    rule, layout = Rule(Spectral(), Stiefel()), RowShard((48, 48), 2)
    plan = make_plan(
        matrices(rule, layout, heads=12) + matrices(rule, layout, name="o", heads=12, axis=1)
    )
    assert plan.totals()["orthogonalized_per_step"] == 24
    assert len(plan.buckets) == 1
    header, rows, columns, total = plan.table().splitlines()
    assert "4 x 48" in rows and rows.split()[-3] == "12"
    assert "48 x 4" in columns and columns.split()[-3] == "12"
    # Every block is sent once, like the whole matrices.
    whole = make_plan(matrices(rule, layout) + matrices(rule, layout, name="o"))
    assert plan.bytes_sent(0) == whole.bytes_sent(0)


@pytest.mark.parametrize(
    ("rule", "axis", "expected"),
    [
        # Muon and Stiefel: singular values as in the whole, whose factor is 1 when square.
        (Rule(Spectral()), 0, 2.0),
        (Rule(Spectral()), 1, 0.5),
        (Rule(Spectral(), Stiefel(3.0)), 0, 2.0),
        (Rule(Spectral(), Stiefel(3.0)), 1, 0.5),
        (Rule(Spectral(scale="none")), 1, 1.0),
        (Rule(Spectral(scale="muon")), 0, 1.0),
        (Rule(Spectral(scale="muon")), 1, 0.5),
        # Entries 1/d_in, with the whole's d_in.
        (Rule(Sign()), 0, 1.0),
        (Rule(Sign()), 1, 0.25),
        # Root mean square of the entries as in the whole.
        (Rule(Spectral(), MANIFOLDS["hypersphere"](2.0)), 0, 1.0),
        (Rule(Spectral(), MANIFOLDS["hypersphere"](2.0)), 1, 1.0),
    ],
)
def test_a_head_has_the_scale_of_the_whole(rule, axis, expected):
    found = matrices(rule, Replicated((16, 16)), heads=4, axis=axis)
    assert [m.scale for m in found] == pytest.approx([expected] * 4, rel=1e-12)
    assert [m.scale for m in matrices(rule, Replicated((16, 16)))] == [1.0]
    # A fused part is a whole of its own.
    fused = matrices(rule, Replicated((48, 16)), (16,) * 3, heads=4, axis=axis)
    assert [m.scale for m in fused] == pytest.approx([expected] * 12, rel=1e-12)


def test_a_manifold_without_such_blocks_is_refused():
    rule = Rule(Spectral(), MANIFOLDS["orthogonal"]())
    with pytest.raises(UsageError, match=r"parameter 'w': per_head.*\(4, 16\) is not square"):
        matrices(rule, Replicated((16, 16)), heads=4)


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


@pytest.mark.parametrize(
    ("rule", "layout", "axis", "expected"),
    [
        # Whole rows of each block, though not of the weight: heads 0, 1 here and 2, 3 there.
        (Rule(RowNorm()), ColShard((8, 8), 2), 1, Transport.LOCAL),
        (Rule(RowNorm()), ColShard((8, 8), 2), 0, Transport.ALLGATHER),
        (Rule(RowNorm()), RowShard((8, 8), 3), 1, Transport.LOCAL),
        (Rule(Spectral()), RowShard((8, 8), 2), 0, Transport.ALLGATHER),
    ],
)
def test_transport_of_heads(rule, layout, axis, expected):
    plan = make_plan(matrices(rule, layout, heads=4, axis=axis))
    assert {b.transport for b in plan.buckets} == {expected}


def test_a_rank_steps_only_the_heads_it_holds_where_nothing_is_sent():
    """The norm of a row of no columns would be an error."""
    plan = make_plan(matrices(Rule(RowNorm()), ColShard((8, 8), 2), heads=4, axis=1))
    shard, written = torch.randn(8, 4), []

    def compute(matrix, operands):
        return RowNorm().lmo(operands[0], matrix.shape)

    Exchange(plan, {"shard": None}).run(
        lambda matrix: (shard[matrix.local(0).slices],),
        compute,
        lambda matrix, result: result,
        lambda matrix, result: written.append((matrix.name, result.shape)),
    )
    assert written == [("w[:, 0:2]", (8, 2)), ("w[:, 2:4]", (8, 2))]


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
    rows = lambda start, stop: Region((start, stop), (0, 5))  # noqa: E731
    assert region.of_box(rows(4, 6)) == Region((0, 2), (0, 5))
    assert region.local(rows(4, 6)) == Region((1, 3), (0, 5))
    assert region.of_box(rows(8, 9)).numel == 0
    assert region.local(rows(0, 3)) == Region((0, 0), (0, 5))
    corner = Region((3, 8), (2, 6))
    assert corner.of_box(Region((0, 4), (5, 9))) == Region((3, 4), (0, 1))
    assert corner.local(Region((0, 4), (5, 9))) == Region((0, 1), (3, 4))
