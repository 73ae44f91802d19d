"""On two ranks as in one process, for every kind of rule and every way to get there."""

import functools

import pytest

from tests.distributed.jobs import by_rank
from tests.optim.contract import RULES

pytestmark = pytest.mark.dist
CASES = ["default_mesh", "backward", "frozen_sharded", "made_before", "ddp", "copies"]
CASES += ["nonfinite", "saved", "warm_up", "bf16_momenta"]


@functools.cache
def found():
    return by_rank(2, "contract_job.py", [], timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process(case):
    """Up to rounding: what each rule's form on shards costs."""
    for rank in found():
        said = {kind: rank[f"{case}, {kind}"] for kind in RULES}
        wrong = {k: v for k, v in said.items() if isinstance(v, str) or not v < 2e-4}
        assert not wrong


def test_weights_off_their_manifold_are_refused_on_every_rank():
    for rank in found():
        assert rank["off_manifold, manifold muon"] == pytest.approx(0.0, abs=1e-5)
