"""Every layout x transport x rule gives the weights of one process, and sends what was planned."""

import pytest

from tests.distributed.jobs import by_rank

pytestmark = pytest.mark.dist

# Summed in another order: AdamW's clipping norm, and norms of rows that ranks share.
SUMMED = ("gain", "embed")


@pytest.mark.parametrize(
    ("ranks", "rules"),
    [
        (1, ("muon", "manifold_muon", "normuon", "heads")),
        (2, ("muon", "manifold_muon", "normuon", "heads")),
        (3, ("muon",)),
        (4, ("manifold_muon",)),
        pytest.param(3, ("manifold_muon", "normuon", "heads"), marks=pytest.mark.slow),
        pytest.param(4, ("muon", "normuon", "heads"), marks=pytest.mark.slow),
        pytest.param(8, ("muon", "manifold_muon", "normuon"), marks=pytest.mark.slow),
    ],
)
def test_every_layout_and_transport_against_one_process(ranks, rules):
    found = by_rank(ranks, "exchange_job.py", rules, timeout=280)
    layouts = {row["layout"] for row in found[0]}
    assert {"ddp", "fsdp", "cols", "middle"} <= layouts
    if ranks >= 4:
        assert {"fsdp_tp", "hsdp", "hsdp_cols"} <= layouts
    for index, row in enumerate(found[0]):
        case = f"{row['rule']} {row['layout']} {row['transport']}"
        exact = {n: e for n, e in row["error"].items() if n not in SUMMED}
        summed = [e for n, e in row["error"].items() if n in SUMMED]
        assert max(summed) <= 1e-6, case
        if row["transport"] in ("owner", "allgather", "reproducible"):
            # What is computed whole is the same to the last bit.
            assert max(exact.values()) == 0.0, case
        elif row["transport"] == "gram":
            assert max(exact.values()) <= 1e-3, case
            assert row["descent"] <= 1e-5, case
        else:
            assert max(exact.values()) <= 1e-3, case
        for rank in found:
            sent, planned = rank[index]["bytes"]
            assert sent == planned, case
            issued, expected, most = rank[index]["collectives"]
            assert issued == expected, case
            assert most <= 2, case
            assert rank[index]["error"] == row["error"], case  # every rank sees the same weights
        assert row["orthogonalized"] == (21 if row["rule"] == "heads" else 13), case
        if row["transport"] == "owner" and row["rule"] != "heads" and ranks > 1:
            assert row["kinds"]["square"] == "owner", case
        if row["transport"] == "gram" and row["layout"] == "fsdp" and ranks > 1:
            expected = "owner" if row["rule"] == "normuon" else "gram"
            assert row["kinds"]["tall"] == expected, case
            assert row["kinds"]["wide"] == "owner", case  # cut along its short side
        if row["layout"] == "cols" and ranks > 1:
            assert row["kinds"]["embed"] == "norms", case
        assert row["kinds"]["head"] == "local", case
