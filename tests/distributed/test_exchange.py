"""Every rule and finish through every transport, against one process; bytes as planned.

What is stepped is drawn from the registries, so a norm, manifold, finish or transport that is added
to one of them is stepped here too; one that cannot be is missed by name.
"""

from statistics import median

import pytest

from geon.optim import FINISHES, MANIFOLDS, NORMS
from geon.optim.shard import TRANSPORTS
from tests.distributed.exchange_cases import BESIDE, cases, ways
from tests.distributed.jobs import by_rank

pytestmark = pytest.mark.dist

ONE_AXIS = ("ddp", "fsdp", "cols", "middle", "flat")
TWO_AXES = ("fsdp_tp", "hsdp", "hsdp_cols")
ALL = (*ONE_AXIS, *TWO_AXES)


@pytest.mark.parametrize(
    ("ranks", "which", "steps", "layouts"),
    [
        pytest.param(2, "most", 4, ONE_AXIS, id="2"),
        pytest.param(4, "few", 4, TWO_AXES, id="4-few"),
        pytest.param(1, "few", 10, ("ddp", "fsdp", "cols"), marks=pytest.mark.slow, id="1-few"),
        pytest.param(2, "all", 10, ONE_AXIS, marks=pytest.mark.slow, id="2-all"),
        pytest.param(3, "most", 10, ONE_AXIS, marks=pytest.mark.slow, id="3"),
        pytest.param(4, "most", 10, ALL, marks=pytest.mark.slow, id="4"),
        pytest.param(8, "few", 10, (*ALL, "hsdp_tp"), marks=pytest.mark.slow, id="8-few"),
    ],
)
def test_every_rule_by_every_transport_is_what_one_process_makes_of_it(
    ranks, which, steps, layouts
):
    found = by_rank(ranks, "exchange_job.py", [which, str(steps), *layouts], timeout=900)
    members = cases(which)
    rows = found[0]["rows"]
    assert {row["layout"] for row in rows} == set(layouts)
    for index, row in enumerate(rows):
        others = [own["rows"][index] for own in found]
        where = f"{row['layout']}, {row['way']}"
        for name, one in row["params"].items():
            check(f"{name}, {where}", row["way"], one)
        for rank, own in enumerate(others):
            assert own["sent"] == own["planned"], f"{where}, rank {rank}: bytes, collectives"
            assert own["most"] <= 2, where
            # Without a gradient, or frozen, nothing moves, the momentum neither; coasting does.
            assert not own["wrong"], f"{where}, rank {rank}: {own['wrong'][:3]}"
            assert not own["apart"], f"{where}: copies differ of {own['apart'][:3]}"
        if steps_of_sums := [d for own in row["descents"].values() for d in own]:
            assert median(steps_of_sums) <= (1e-5 if row["way"] != "bf16" else 1e-2), where
        assert row["orthogonalized"] == orthogonalized(members, row["params"]), where
    check_ways(rows, ranks)
    if ranks > 1:
        assert {kind for row in rows for kind in row["rested"]} == set(TRANSPORTS)
        assert max(row["buckets"] for row in rows) > 3
    if which != "few":
        check_coverage(members, rows)
        assert set(found[0]["at_work"]) == set(FINISHES)


def check(case, way, one):
    """What is computed whole is the same to the last bit; what is summed, nearly."""
    kinds = set(one["kinds"])
    if not kinds or "norms" in kinds:
        # In another order: AdamW's clipping norm, and norms of rows that ranks share.
        assert one["error"] <= 1e-6, case
    elif "gram" in kinds:
        assert one["error"] <= 1e-3, case
    elif way != "bf16" or kinds == {"local"}:
        assert one["equal"], f"{case} by {'+'.join(kinds)}: {one['error']:.1e}"


def orthogonalized(members, params):
    """Matrices among them whose polar factor is taken in a step."""
    return sum(
        sum(form.count for block in info.blocks(case.per_head) for form in block.forms)
        for case, own in members.values()
        for _, info in own
        if case.rule.orthogonalizes and info.name in params
    )


def check_ways(rows, ranks):
    """Each way is what it says."""
    for row in rows:
        where, params = f"{row['layout']}, {row['way']}", row["params"]
        kinds = {name: set(one["kinds"]) for name, one in params.items()}
        if row["way"] in TRANSPORTS:
            assert all(row["way"] in own for own in kinds.values()), where
        elif "head" in kinds:
            assert kinds["head"] == {"local"}, where
            assert kinds["embed"] == ({"norms"} if cut_columns(row, ranks) else {"local"}), where
        if row["way"] == "reproducible":
            assert not any("gram" in own for own in kinds.values()), where
        if row["way"] == "bf16" and ranks > 1:
            moved = [one["of_move"] for one in params.values() if one["kinds"] == ["owner"]]
            assert 1e-5 < median(moved) < 1e-2, where  # rounded by 2^-9, in updates and directions


def cut_columns(row, ranks):
    """Whether ranks share the rows of `embed`."""
    by = {"cols": ranks, "fsdp_tp": ranks // 2, "hsdp_cols": ranks // 2, "hsdp_tp": 2}
    return by.get(row["layout"], 1) > 1 or (row["layout"] == "flat" and 21 % ranks)


def check_coverage(members, rows):
    """All that the registries have was stepped, and by every transport that it may take."""
    stepped = {name for row in rows for name in row["params"]}
    assert stepped == {info.name for _, own in members.values() for _, info in own} | set(BESIDE)
    own = [case for case, shapes in members.values() if shapes]
    assert {case.norm for case in own} == set(NORMS)
    assert {case.manifold for case in own} == set(MANIFOLDS)
    assert {finish for case in own for finish in case.finishes} == set(FINISHES)
    assert {row["way"] for row in rows} == set(ways())
    used = {kind for row in rows for one in row["params"].values() for kind in one["kinds"]}
    assert used == set(TRANSPORTS)
    # The whole of what must be whole, and each finish, by its owner and where it lies.
    for kind in ("local", "owner"):
        by = {n for row in rows for n, one in row["params"].items() if kind in one["kinds"]}
        assert by >= stepped - {"gain"}, kind
