"""The same weights on any number of ranks and in any layout, by real jobs under torchrun."""

import json

import pytest

from tests.distributed.jobs import distance, metrics, train, weights

pytestmark = pytest.mark.dist

CASES = [
    ("hybrid", 2, ["parallel=ddp"]),
    ("hybrid", 2, ["parallel=fsdp"]),
    ("hybrid", 2, ["parallel=fsdp", "data.micro_batch=4", "shard.max_buffer_mb=0.05"]),
    ("hybrid", 3, ["parallel=fsdp", "data.batch_tokens=1920"]),
    ("hybrid", 4, ["parallel=hsdp", "parallel.replicas=2"]),
    ("muon", 2, ["parallel=fsdp", "model.fused_qkv=true"]),
    ("scion", 2, ["parallel=fsdp", "model=gpt2"]),
    ("adamw", 2, ["parallel=fsdp", "model=gpt2"]),
]


@pytest.mark.parametrize(("optim", "ranks", "options"), CASES)
def test_ranks_give_the_weights_of_one_process_after_20_steps(tmp_path, optim, ranks, options):
    model = [o for o in options if o.startswith(("model", "data.batch"))]
    alone = train(tmp_path, "alone", 1, f"optim={optim}", *model)
    together = train(tmp_path, "together", ranks, f"optim={optim}", *options)
    assert distance(weights(alone), weights(together)) <= 1e-5
    rows = metrics(together, "train")
    assert rows[-1]["step"] == 20
    plan = json.loads((together / "plan.json").read_text())
    expected = {"adamw": 0}.get(optim, 6 * 2)
    assert rows[-1]["matrices_orthogonalized"] == expected
    assert plan["totals"]["orthogonalized_per_step"] == expected
    # What was sent is what was planned, to the byte (the log is rank 0's).
    assert rows[-1]["optimizer_bytes_sent"] == 20 * plan["totals"]["bytes_sent_per_rank"][0]


def test_the_printed_plan_is_the_plan_that_runs(tmp_path):
    from geon.launch import local
    from tests.distributed.jobs import TINY

    options = ["parallel=fsdp", "optim=hybrid", "schedule.steps=1"]
    folder = train(tmp_path, "run", 2, *options)
    done = local.run(
        1, [*TINY, *options, "mode=plan", "plan.format=json", "plan.world_size=2"], timeout=60
    )
    printed, followed = json.loads(done.stdout), json.loads((folder / "plan.json").read_text())
    assert printed == followed


def test_a_wrong_rank_count_is_one_clear_error_on_every_rank(tmp_path):
    done = train(tmp_path, "x", 2, "parallel=single", ok=False)
    assert done.returncode != 0
    assert done.stderr.count("geon: error: parallel=single runs one process") >= 1
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torchrun")[0] or (
        "geon: error" in done.stderr
    )
    assert not (tmp_path / "x").exists()
    done = train(tmp_path, "x", 3, "parallel=hsdp", "parallel.replicas=2", ok=False)
    assert "parallel.replicas 2 does not fit 3 ranks" in done.stderr
    assert not (tmp_path / "x").exists()
