"""Layouts, plans and predictions, without any process group."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.errors import UsageError
from geon.optim import MANIFOLDS, ParamInfo, Role, Rule, Spectral, Stiefel, matrices_of
from geon.optim.norms import ColNorm, RowNorm, Sign
from geon.optim.shard import (
    MACHINES,
    TRANSPORTS,
    Bucket,
    Flat,
    Grid,
    Job,
    Region,
    Sharding,
    make_plan,
)
from geon.optim.shard.exchange import OwnBucket
from geon.optim.shard.transports import Offer
from geon.optim.step import view

BYTES = Sharding(objective="bytes")


def matrices(rule, layout, splits=(), name="w", heads=0, axis=0, wire=4):
    """Of one weight: its parts, or with heads their blocks."""
    tensor = getattr(layout, "tensor", layout.shape)
    info = ParamInfo(name, tensor, Role.HIDDEN, splits, heads, axis)
    return matrices_of(info, "hidden", rule, layout, heads > 0, wire)


@st.composite
def layouts(draw, most=17):
    """Any layout of a matrix or a batch: grids with one to three mesh dimensions, and flat ones."""
    shape = tuple(draw(st.integers(1, most)) for _ in range(2))
    if draw(st.booleans()):
        ranks = draw(st.integers(1, 8))
        least = -(-shape[0] * shape[1] // ranks)
        return Flat(shape, ranks, least + draw(st.integers(0, 3)))
    if draw(st.booleans()):
        shape = (draw(st.integers(1, 4)), *shape)
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    axes = st.none() | st.integers(0, len(shape) - 1)
    cuts = [(dim, axis) for dim in range(len(mesh)) if (axis := draw(axes)) is not None]
    return Grid(shape, mesh, tuple(draw(st.permutations(cuts))))


def store(layout, whole):
    """What each rank stores, flat, as a device mesh (or DeepSpeed) would leave it."""
    if isinstance(layout, Flat):
        flat = whole.reshape(-1)
        return [flat[slice(*layout.run(r))].clone() for r in range(layout.ranks)]
    stored = []
    for rank in range(layout.ranks):
        place = torch.tensor(rank)
        place = [int(x) for x in torch.unravel_index(place, layout.mesh)]
        own = whole.view(layout.tensor)
        for dim, axis in layout.cuts:
            chunks = own.chunk(layout.mesh[dim], dim=axis) if own.shape[axis] else ()
            empty = own.narrow(axis, 0, 0)
            own = chunks[place[dim]] if place[dim] < len(chunks) else empty
        stored.append(own.contiguous().view(-1))
    return stored


@settings(max_examples=400, deadline=None)
@given(layout=layouts(), splits=st.integers(1, 4), data=st.data())
def test_pieces_are_where_torch_puts_them(layout, splits, data):
    """Every entry of every part is found in the storage of each rank that torch gives it to."""
    whole = torch.arange(float(layout.shape[0] * layout.shape[1])).view(layout.shape)
    shards = store(layout, whole)
    parts = ()
    if len(getattr(layout, "tensor", (0, 0))) == 2 and layout.shape[0] % splits == 0:
        parts = (layout.shape[0] // splits,) * splits
    seen = [0] * layout.ranks
    for matrix in matrices(Rule(Spectral()), layout, parts):
        part = whole[matrix.box.slices]
        count = torch.zeros(matrix.shape)
        for rank, shard in enumerate(shards):
            for piece in matrix.holding.pieces[rank]:
                assert torch.equal(view(shard, piece), part[piece.region.slices])
                seen[rank] += piece.region.numel
        for copies in matrix.holding.copies:
            for piece in matrix.holding.pieces[copies[0]]:
                count[piece.region.slices] += 1
        assert (count == 1).all()  # over one of each set of copies, every entry once
    assert seen == [shard.numel() for shard in shards]


RULES = {
    "muon": Rule(Spectral()),
    "manifold muon": Rule(Spectral(), Stiefel()),
    "normuon": Rule(Spectral(), second_moment=0.9),
    "rows": Rule(RowNorm()),
    "signs": Rule(Sign()),
}


def offered(matrix):
    """Every transport that the matrix may go by."""
    return [t for t in TRANSPORTS.values() if t.offer(matrix, False) is not Offer.NO]


@settings(max_examples=300, deadline=None)
@given(
    layout=layouts(9),
    rule=st.sampled_from(list(RULES)),
    wire=st.sampled_from([2, 4]),
    data=st.data(),
)
def test_what_is_sent_is_what_is_received(layout, rule, wire, data):
    """Nothing goes to the sender itself, and both sides pack and unpack in one order."""
    jobs = []
    for matrix in matrices(RULES[rule], layout, wire=wire):
        for transport in offered(matrix):
            owner = data.draw(st.integers(0, layout.ranks - 1))
            jobs.append(Job(matrix, transport, owner))
    for job in jobs:
        down, up, held = job.down, job.up, job.matrix.holding.words
        for message in (*down, *up):
            assert message.sender != message.receiver
            assert 0 <= message.sender < layout.ranks > message.receiver >= 0
            assert message.size == sum(count * width for count, width in message.words) > 0
        # Who sends to whom is said once.
        for way in (down, up):
            assert len({(m.sender, m.receiver) for m in way}) == len(way)
        assert {m.receiver for m in down} <= {job.owner} >= {m.sender for m in up}
        assert job.bytes_sent == sum(m.size for m in (*down, *up))
        if str(job.transport) == "owner":
            whole = job.matrix.shape[0] * job.matrix.shape[1]
            missing = whole - held[job.owner]
            assert sum(m.size for m in down) == missing * sum(job.matrix.words_in)
            rows = job.matrix.row_states * job.matrix.shape[0] * (layout.ranks - 1)
            others = sum(held) - held[job.owner]
            assert sum(m.size for m in up) == others * job.matrix.bytes_out + rows * 4
        elif str(job.transport) == "local":
            assert not down + up
        else:
            assert all(width == 4 for m in (*down, *up) for _, width in m.words)
    bucket = Bucket(tuple(jobs), layout.ranks, MACHINES["cpu"])
    views = [OwnBucket.of(0, bucket, rank) for rank in range(layout.ranks)]
    for way in (0, 1):
        for sender, one in enumerate(views):
            receivers = [m.receiver for _, m in one.sends[way]]
            assert receivers == sorted(receivers)
            for receiver, other in enumerate(views):
                sent = [pair for pair in one.sends[way] if pair[1].receiver == receiver]
                got = [pair for pair in other.gets[way] if pair[1].sender == sender]
                assert sent == got
        for one, load in zip(views, bucket.loads, strict=True):
            sent, got = ((load.down_sent, load.down_got), (load.up_sent, load.up_got))[way]
            assert sum(m.size for _, m in one.sends[way]) == sent.total
            assert sum(m.size for _, m in one.gets[way]) == got.total


def test_layouts_say_what_they_are():
    assert Grid.whole((8, 4)).name == "whole"
    assert Grid.whole((8, 4), 2).name == "whole x2"
    assert Grid.rows((8, 4), 4).name == "rows/4"
    assert Grid((8, 4), (2, 4), ((1, 0),)).name == "rows/4 x2"
    assert Grid((8, 4), (2, 2), ((1, 1), (0, 0))).name == "rows/2 cols/2"
    assert Grid((8, 4), (2, 2), ((1, 0), (0, 0))).name == "rows/4"
    assert Grid((3, 8, 4), (3,), ((0, 0),)).name == "batch/3"
    assert Grid((8,), (2,), ((0, 0),)).name == "cols/2"
    assert Flat((8, 4), 4, 8).name == "flat/4"


def test_a_flat_run_is_three_boxes():
    layout = Flat((5, 4), 2, 10)
    regions = [p.region for p in layout.pieces(0)]
    assert regions == [Region((0, 2), (0, 4)), Region((2, 3), (0, 2))]
    regions = [p.region for p in layout.pieces(1)]
    assert regions == [Region((2, 3), (2, 4)), Region((3, 5), (0, 4))]
    assert [p.offset for p in layout.pieces(1)] == [0, 2]


@pytest.mark.parametrize(
    ("splits", "axis", "names"),
    [
        ((), 0, ["w[0:2]", "w[2:4]", "w[4:6]", "w[6:8]"]),
        ((), 1, ["w[:, 0:2]", "w[:, 2:4]", "w[:, 4:6]", "w[:, 6:8]"]),
        ((4, 4), 1, [f"w[{r}, {c}]" for r in ("0:4", "4:8") for c in ("0:2", "2:4", "4:6", "6:8")]),
    ],
)
def test_names_show_what_is_a_part(splits, axis, names):
    found = matrices(Rule(Spectral()), Grid.whole((8, 8)), splits, heads=4, axis=axis)
    assert [m.name for m in found] == names


def test_head_blocks_are_counted_and_printed_as_matrices():
    """12 blocks of rows and 12 of columns, each kind one line, all in one bucket."""
    rule, layout = Rule(Spectral(), Stiefel()), Grid.rows((48, 48), 2)
    plan = make_plan(
        matrices(rule, layout, heads=12) + matrices(rule, layout, name="o", heads=12, axis=1),
        Sharding("owner"),
    )
    assert plan.totals()["orthogonalized_per_step"] == 24
    lines = plan.table().splitlines()
    assert sum("4 x 48" in line and " local " in line for line in lines) == 1
    assert sum("48 x 4" in line and " owner " in line for line in lines) == 1
    # Blocks of rows lie whole on a rank and travel nowhere; blocks of columns are sent once each.
    whole = make_plan(matrices(rule, layout, name="o"), Sharding("owner"))
    assert sum(plan.bytes_sent) == sum(whole.bytes_sent)


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
    found = matrices(rule, Grid.whole((16, 16)), heads=4, axis=axis)
    assert [m.scale for m in found] == pytest.approx([expected] * 4, rel=1e-12)
    assert [m.scale for m in matrices(rule, Grid.whole((16, 16)))] == [1.0]
    # A fused part is a whole of its own.
    fused = matrices(rule, Grid.whole((48, 16)), (16,) * 3, heads=4, axis=axis)
    assert [m.scale for m in fused] == pytest.approx([expected] * 12, rel=1e-12)


def test_a_manifold_without_such_blocks_is_refused():
    rule = Rule(Spectral(), MANIFOLDS["orthogonal"]())
    with pytest.raises(UsageError, match=r"parameter 'w': per_head.*\(4, 16\) is not square"):
        matrices(rule, Grid.whole((16, 16)), heads=4)


@pytest.mark.parametrize(
    ("rule", "layout", "expected"),
    [
        (Rule(Sign()), Grid.rows((8, 4), 4), "local"),
        (Rule(Sign()), Grid.cols((8, 4), 4), "local"),
        (Rule(Sign()), Flat((8, 4), 4, 9), "local"),
        (Rule(ColNorm()), Grid.rows((9, 4), 4), "local"),
        (Rule(RowNorm()), Grid.cols((8, 4), 4), "norms"),
        (Rule(RowNorm()), Flat((8, 4), 4, 9), "norms"),
        (Rule(RowNorm()), Flat((8, 4), 4, 8), "local"),
        (Rule(Spectral()), Grid.rows((64, 64), 4), "owner"),
        (Rule(Spectral()), Grid.whole((8, 4)), "local"),
        (Rule(Spectral()), Grid.rows((8, 4), 1), "local"),
        (Rule(Spectral()), Grid.rows((6, 8, 4), 3), "local"),
        (Rule(Spectral()), Grid.rows((400, 4), 2), "gram"),
        (Rule(Spectral(), Stiefel()), Grid.rows((64, 64), 2), "owner"),
        (Rule(Spectral(), Stiefel()), Grid.rows((400, 4), 2), "gram"),
        (Rule(Spectral(), MANIFOLDS["hypersphere"]()), Grid.rows((400, 4), 2), "owner"),
    ],
)
def test_by_bytes_the_transport_follows_what_must_be_whole(rule, layout, expected):
    plan = make_plan(matrices(rule, layout), BYTES)
    assert {str(job.transport) for job in plan.jobs} == {expected}


@pytest.mark.parametrize(
    ("rule", "layout", "axis", "expected"),
    [
        # Whole rows of each block, though not of the weight: heads 0, 1 here and 2, 3 there.
        (Rule(RowNorm()), Grid.cols((8, 8), 2), 1, {"local"}),
        (Rule(RowNorm()), Grid.cols((8, 8), 2), 0, {"norms"}),
        (Rule(RowNorm()), Grid.rows((8, 8), 3), 1, {"local"}),
        (Rule(Spectral()), Grid.rows((8, 8), 2), 0, {"local"}),
        (Rule(Spectral()), Grid.cols((8, 8), 2), 1, {"local"}),
        (Rule(Spectral()), Grid.rows((8, 8), 3), 0, {"local", "owner"}),
        (Rule(Spectral()), Grid.rows((8, 8), 2), 1, {"owner"}),
    ],
)
def test_heads_that_lie_whole_on_a_rank_are_not_sent(rule, layout, axis, expected):
    plan = make_plan(matrices(rule, layout, heads=4, axis=axis), Sharding("owner"))
    assert {str(job.transport) for job in plan.jobs} == expected


def test_transports_that_were_asked_for():
    rule, layout = Rule(Spectral()), Grid.rows((64, 8), 4)
    for wish in ("owner", "gram"):
        plan = make_plan(matrices(rule, layout), Sharding(wish))
        assert [str(job.transport) for job in plan.jobs] == [wish]
    # A matrix cut along its short side has no sums to take.
    short = make_plan(matrices(rule, Grid.rows((8, 64), 4)), Sharding("gram"))
    assert [str(job.transport) for job in short.jobs] == ["owner"]
    # Copies everywhere: by bytes each computes its own; owners split the work when asked.
    copies = matrices(rule, Grid.whole((64, 8), 4))
    assert make_plan(copies, BYTES).jobs[0].transport is TRANSPORTS["local"]
    assert make_plan(copies, Sharding("owner")).jobs[0].transport is TRANSPORTS["owner"]
    exact = make_plan(matrices(rule, layout), Sharding(reproducible=True))
    assert [str(job.transport) for job in exact.jobs] == ["owner"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "gramm"}, "shard.transport 'gramm'.*Did you mean 'gram'"),
        ({"objective": "words"}, "shard.objective 'words' is not one of time, bytes"),
        ({"transport": "gram", "reproducible": True}, "shard.reproducible=true takes owners only"),
        ({"wire": "fp16"}, "shard.wire 'fp16' is not one of fp32, bf16"),
        ({"wire": "bf16", "reproducible": True}, "shard.reproducible=true needs every bit"),
    ],
)
def test_a_bad_sharding_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Sharding(**options)


def test_bytes_by_hand():
    """Uneven: 10 rows over 4 ranks are 3, 3, 3, 1; each transport's bytes, counted by hand."""
    layout, row = Grid.rows((10, 6), 4), 6 * 4
    plan = make_plan(matrices(Rule(Spectral()), layout), Sharding("owner"))
    assert plan.jobs[0].owner == 0
    assert plan.bytes_sent == [7 * row, 3 * row, 3 * row, row]
    plan = make_plan(matrices(Rule(Spectral(), Stiefel()), layout), Sharding("owner"))
    assert plan.bytes_sent == [7 * row, 6 * row, 6 * row, 2 * row]
    plan = make_plan(matrices(Rule(Spectral()), layout, wire=2), Sharding("owner"))
    assert plan.bytes_sent == [7 * row // 2, 3 * row // 2, 3 * row // 2, row // 2]
    plan = make_plan(matrices(Rule(Spectral()), layout), Sharding("gram"))
    assert plan.bytes_sent == [3 * 21 * 4, 22 * 4, 22 * 4, 22 * 4]
    plan = make_plan(matrices(Rule(Spectral(), Stiefel()), layout), Sharding("gram"))
    assert plan.bytes_sent == [3 * 72 * 4, 79 * 4, 79 * 4, 79 * 4]


def test_replicas_gather_once_and_share_the_work():
    """HSDP 2 x 2: one replica sends, all ranks receive: 1/4 + 3/4 of a matrix, as 1/2 + 1/2."""
    layout = Grid((8, 4), (2, 2), ((1, 0),))
    many = [m for i in range(8) for m in matrices(Rule(Spectral()), layout, name=f"w{i}")]
    plan = make_plan(many, Sharding("owner"))
    assert plan.owner_flops == [sum(plan.owner_flops) // 4] * 4
    assert sum(plan.bytes_sent) == 8 * (4 * 4 + 3 * 16) * 4
    assert max(plan.bytes_sent) == min(plan.bytes_sent)


def gpt_shapes(layers, width):
    return ([(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]) * layers


@pytest.mark.parametrize("rule", [Rule(Spectral()), Rule(Spectral(), Stiefel())])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 12])
def test_owners_of_a_gpt_are_balanced(rule, ranks):
    many = []
    for i, shape in enumerate(gpt_shapes(12, 64)):
        many += matrices(rule, Grid.rows(shape, ranks), name=f"w{i}")
    plan = make_plan(many, Sharding("owner"))
    assert plan.totals()["owner_balance"] <= (1.10 if ranks <= 8 else 1.34)


def test_buckets_are_bounded_and_keep_everything():
    rule, layout = Rule(Spectral()), Grid.rows((256, 256), 4)
    many = [m for i in range(20) for m in matrices(rule, layout, name=f"w{i}")]
    whole = make_plan(many, Sharding("owner", max_buffer_mb=1000))
    assert len(whole.buckets) == 1
    one = max(load.buffer for load in make_plan(many[:4], Sharding("owner")).buckets[0].loads)
    plan = make_plan(many, Sharding("owner", max_buffer_mb=2.5 * one / 2**20))
    assert [len(b.jobs) for b in plan.buckets] == [8, 8, 4]
    assert sorted(m.param for m in plan.matrices) == sorted(f"w{i}" for i in range(20))
    assert max(load.buffer for b in plan.buckets for load in b.loads) <= 2.5 * one
    assert plan.peak_buffer <= 5 * one
    # However small the limit, every rank gets one matrix in a bucket.
    tight = make_plan(many, Sharding("owner", max_buffer_mb=1e-6))
    assert all(len({job.owner for job in b.jobs}) >= 2 for b in tight.buckets)
    assert len(tight.buckets) >= 5


def test_auto_by_bytes_is_never_above_a_single_transport():
    for ranks in (2, 3, 4, 8):
        for wire in (2, 4):
            for rule in (Rule(Spectral()), Rule(Spectral(), Stiefel())):
                many = []
                for i, shape in enumerate([*gpt_shapes(2, 24), (500, 8), (8, 500), (3, 2)]):
                    cut = Grid.rows if shape[0] >= shape[1] else Grid.cols
                    many += matrices(rule, cut(shape, ranks), name=f"w{i}", wire=wire)
                total = lambda wish: sum(make_plan(many, wish).bytes_sent)  # noqa: B023, E731
                best = min(total(Sharding(t)) for t in ("owner", "gram"))
                assert total(BYTES) <= best


def test_plans_are_deterministic_data():
    rule = Rule(Spectral(), Stiefel())
    build = lambda rows: make_plan(matrices(rule, Grid.rows((rows, 4), 2), (rows // 2,) * 2))  # noqa: E731
    assert build(8).digest == build(8).digest != build(12).digest
    content = json.loads(json.dumps(build(8).to_dict()))
    assert {row["name"] for row in content["matrices"]} == {"w[0:4]", "w[4:8]"}
    assert content["totals"]["orthogonalized_per_step"] == 2
    assert {row["route"] for row in content["matrices"]} == {"hidden"}
    assert "2 matrices orthogonalized" in build(8).table()
    assert set(MACHINES) == {"cpu", "cuda", "cuda_infiniband", "cuda_ethernet"}
