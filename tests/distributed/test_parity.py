"""The same weights on any number of ranks and in any layout, by real jobs under torchrun."""

import json
from functools import cache

import pytest
import torch

from tests.distributed.jobs import STIEFEL, distance, metrics, train, weights

pytestmark = pytest.mark.dist

CASES = [
    ("hybrid", 2, ["parallel=ddp", "data.micro_batch=4", "shard.transport=owner", *STIEFEL[1:]]),
    ("hybrid", 2, ["parallel=fsdp"]),
    pytest.param(
        "hybrid",
        2,
        ["parallel=fsdp", "data.micro_batch=4", "shard.max_buffer_mb=0.05", *STIEFEL[1:]],
        marks=pytest.mark.slow,
    ),
    ("hybrid", 3, ["parallel=fsdp", "data.batch_tokens=1920"]),
    ("hybrid", 4, ["parallel=hsdp", "parallel.replicas=2", "data.micro_batch=4", *STIEFEL[1:]]),
    ("muon", 2, ["parallel=fsdp", "model.fused_qkv=true"]),
    pytest.param("scion", 2, ["parallel=fsdp"], marks=pytest.mark.slow),
    ("adamw", 2, ["parallel=fsdp", "model=gpt2"]),
    ("hybrid", 2, ["parallel=tp"]),
    ("scion", 4, ["parallel=fsdp_tp", "data.micro_batch=4"]),
    pytest.param("hybrid", 2, ["parallel=deepspeed_z0"], marks=pytest.mark.slow),
    ("hybrid", 3, ["parallel=deepspeed_z1", "data.batch_tokens=3840", "data.micro_batch=10"]),
    pytest.param(
        "hybrid", 2, ["parallel=deepspeed_z2", "data.micro_batch=4"], marks=pytest.mark.slow
    ),
    ("muon", 2, ["parallel=deepspeed_z3", "optim.max_norm=0", "data.micro_batch=4"]),
    pytest.param(
        "muon", 2, ["parallel=fsdp", "optim.hidden.per_head=true"], marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights of one process by options; several cases compare with the same."""

    @cache
    def run(optim, *options):
        folder = tmp_path_factory.mktemp("alone")
        return weights(train(folder, "alone", 1, f"optim={optim}", *options))

    return run


@pytest.mark.parametrize(("optim", "ranks", "options"), CASES)
def test_ranks_give_the_weights_of_one_process_after_20_steps(
    tmp_path, alone, optim, ranks, options
):
    model = [o for o in options if o.startswith(("model", "data.batch", "optim."))]
    together = train(tmp_path, "together", ranks, f"optim={optim}", *options)
    one, many = alone(optim, *model), weights(together)
    if "model=gpt2" in options:
        # Attention does not see a key bias, so its gradient is rounding noise, which AdamW
        # scales to a step of full size. It has no effect on anything else.
        one, many = ({k: v for k, v in w.items() if "k.bias" not in k} for w in (one, many))
    assert distance(one, many) <= 1e-5
    rows = metrics(together, "train")
    assert rows[-1]["step"] == 20
    plan = json.loads((together / "plan.json").read_text())
    # Of 2 layers: q, k, v and the output projection, one or a block a head of 2, and the MLP's two.
    attention = 8 if "optim.hidden.per_head=true" in options else 4
    if optim == "hybrid" and "optim.overrides.qk=null" not in options:
        attention = 6  # only q and k by heads
    expected = {"adamw": 0}.get(optim, (attention + 2) * 2)
    assert rows[-1]["matrices_orthogonalized"] == expected
    assert plan["totals"]["orthogonalized_per_step"] == expected
    # What was sent is what was planned, to the byte (the log is rank 0's).
    assert rows[-1]["optimizer_bytes_sent"] == 20 * plan["totals"]["bytes_sent_per_rank"][0]


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("gpt", []),
        pytest.param("gpt2", [], marks=pytest.mark.slow),
        ("gpt", ["optim.hidden.per_head=true"]),
        pytest.param("gpt", ["optim.momentum_dtype=bf16"], marks=pytest.mark.slow),
    ],
)
def test_sharding_the_optimizer_changes_no_bit(tmp_path, model, more):
    """DDP and FSDP average two gradients alike, so all that differs is our exchange."""
    options = [f"model={model}", "model.fused_qkv=true", "optim=hybrid", *more]
    ddp = train(tmp_path, "ddp", 2, "parallel=ddp", *options)
    fsdp = train(tmp_path, "fsdp", 2, "parallel=fsdp", *options)
    a, b = weights(ddp), weights(fsdp)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (4, "fsdp_tp"),
        (3, "deepspeed_z1"),
        pytest.param(2, "fsdp", marks=pytest.mark.slow),
        pytest.param(4, "hsdp", marks=pytest.mark.slow),
        pytest.param(2, "deepspeed_z3", marks=pytest.mark.slow),
    ],
)
def test_the_printed_plan_is_the_plan_that_runs(tmp_path, ranks, layout):
    from geon.launch import local
    from tests import warm
    from tests.distributed.jobs import TINY

    options = [f"parallel={layout}", "optim=hybrid", "schedule.steps=1", "data.batch_tokens=3072"]
    folder = train(tmp_path, "run", ranks, *options)
    ahead = ["mode=plan", "plan.format=json", f"plan.world_size={ranks}"]
    done = warm.run(0, local.ROOT / "train.py", [*TINY, *options, *ahead], timeout=60)
    printed, followed = json.loads(done.stdout), json.loads((folder / "plan.json").read_text())
    assert printed == followed


def test_a_wrong_rank_count_is_one_clear_error_on_every_rank(tmp_path):
    done = train(tmp_path, "x", 2, "parallel=single", ok=False)
    assert done.returncode != 0
    assert "geon: error: parallel=single runs one process" in done.stderr
    # torchrun itself ends with a traceback; none may name our files but the program's.
    assert "/engine/" not in done.stderr
    assert not (tmp_path / "x").exists()
    done = train(tmp_path, "x", 3, "parallel=hsdp", "parallel.replicas=2", ok=False)
    assert "parallel.replicas 2 does not fit 3 ranks" in done.stderr
    done = train(tmp_path, "x", 2, "parallel=deepspeed_z1", "optim=muon", ok=False)
    assert done.returncode != 0
    assert "set optim.max_norm=0" in done.stderr
    assert not (tmp_path / "x").exists()
