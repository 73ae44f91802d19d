"""Predicted seconds: what is chosen by them, two levels of a network, and machines of one's own."""

from dataclasses import replace

import pytest

from geon.engine.build import make_model, make_routing, make_sharding
from geon.engine.planning import plan_ahead
from geon.launch.compose import compose
from geon.optim import ParamInfo, Polar, Role, Rule, Spectral, matrices_of
from geon.optim.shard import MACHINES, Bytes, Grid, Machine, Sharding, constant, make_plan
from tests.optim.test_shard_plan import matrices

RATES = constant(1e12), constant(1e14), constant(3e13)


def test_time_takes_the_slower_arithmetic_into_account():
    """The Gram form is never in bf16: worth it on a slow network only."""
    rule = Rule(Spectral(polar=Polar("keller", 5)))
    info = ParamInfo("w", (4096, 1024), Role.HIDDEN)
    layout = Grid.rows((4096, 1024), 2)

    def choose(machine, device):
        found = matrices_of(info, "g", rule, layout, False, 4, device)
        return make_plan(found, Sharding(machine=machine)).jobs[0].transport

    slow = Machine(*RATES, bandwidth=1e7, latency=1e-5)
    fast = Machine(*RATES, bandwidth=1e13, latency=1e-5)
    assert str(choose(slow, "cuda")) == "gram"
    assert str(choose(fast, "cuda")) != "gram"


def test_predicted_seconds_hide_what_travels_behind_the_computation():
    rule, layout = Rule(Spectral()), Grid.rows((256, 256), 4)
    many = [m for i in range(64) for m in matrices(rule, layout, name=f"w{i}")]
    machine = Machine(*[constant(1e11)] * 3, bandwidth=1e9, latency=1e-6)
    one = make_plan(many, Sharding("owner", max_buffer_mb=1000, machine=machine))
    several = make_plan(many, Sharding("owner", max_buffer_mb=4, machine=machine))
    assert len(several.buckets) > 3
    assert several.seconds < one.seconds
    work = max(one.flops) / 1e11
    assert work < several.seconds < work + 2 * max(one.bytes_sent) / 1e9


TWO_LEVELS = Machine(*[constant(1e9)] * 3, bandwidth=1e6, latency=1e-3, node=2, far_bandwidth=1e5)


def test_what_crosses_nodes_is_priced_by_the_far_network():
    """8 x 4 over 2 nodes of 2 ranks: 32 bytes from each of three ranks to the owner, and back."""
    cases = [
        # Rank 0 receives 32 bytes from its node, and 64 from the other one: 32 us + 640 us.
        (TWO_LEVELS, 32e-6 + 640e-6, Bytes(32, 64)),
        # Ranks 0, 1 and 2 are a node; 3 is the next one's first.
        (replace(TWO_LEVELS, node=3), 64e-6 + 320e-6, Bytes(64, 32)),
        # One level: all 96 bytes at 1 MB/s.
        (replace(TWO_LEVELS, node=0), 96e-6, Bytes(96, 0)),
        (replace(TWO_LEVELS, node=4), 96e-6, Bytes(96, 0)),
    ]
    for machine, travel, got in cases:
        wish = Sharding("owner", objective="bytes", machine=machine)
        plan = make_plan(matrices(Rule(Spectral()), Grid.rows((8, 4), 4)), wish)
        (bucket,) = plan.buckets
        assert bucket.jobs[0].owner == 0
        # The owner is the busiest both ways: others send, and receive, no more than 320 us.
        assert (bucket.loads[0].down_got, bucket.loads[0].up_sent) == (got, got)
        near, far = bucket.loads[1].down_sent, bucket.loads[3].down_sent
        assert (near, far) == (Bytes(32, 0), Bytes(0, 32) if got.far else Bytes(32, 0))
        work = plan.flops[0] / 1e9
        assert bucket.phases == pytest.approx((travel + 1e-3, travel + 1e-3, work), rel=1e-12)
        assert plan.seconds == pytest.approx(2 * (travel + 1e-3) + work, rel=1e-12)
        assert plan.bytes_sent == [96, 32, 32, 32]


def test_a_slow_far_network_changes_what_is_chosen():
    """Sums cost arithmetic and save bytes: worth it where the whole would cross nodes."""
    rule, layout = Rule(Spectral(polar=Polar("keller", 5))), Grid.rows((4096, 1024), 4)
    info = ParamInfo("w", (4096, 1024), Role.HIDDEN)
    found = matrices_of(info, "g", rule, layout, False, 4, "cuda")
    near = Machine(*RATES, bandwidth=1e13, latency=1e-5)
    plans = [
        make_plan(found, Sharding(machine=one))
        for one in (near, replace(near, node=2, far_bandwidth=1e7), replace(near, node=4))
    ]
    assert [str(plan.jobs[0].transport) for plan in plans] == ["owner", "gram", "owner"]


@pytest.mark.parametrize("name", ["mine", "mine_two_levels"])
def test_a_new_machine_can_be_planned_for(name, monkeypatch):
    """One more row is all that it takes, whatever its name."""
    monkeypatch.setitem(MACHINES, name, TWO_LEVELS)
    config = compose([f"shard.machine={name}", "parallel=fsdp", "model/size=tiny"])
    sharding = make_sharding(config)
    assert sharding.machine == TWO_LEVELS
    model = make_model(config.model)
    plan = plan_ahead(config, model, make_routing(model, config.optim), 4)
    assert plan.sharding == sharding
    assert any(load.down_sent.far for b in plan.buckets for load in b.loads)
    assert plan.seconds > 0
