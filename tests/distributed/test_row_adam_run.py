"""Adam with a second moment a row on two ranks: the weights of one process, and state for any."""

import shutil

import pytest

from tests.distributed.jobs import distance, train, weights

pytestmark = pytest.mark.dist

WIRE = "shard.wire=fp32"
OPTIONS = [
    "optim=hybrid_tokens",
    "optim.polar.dtype=fp32",
    "parallel.precision=fp32",
    "data.vocab_size=62",
    "data.batch_tokens=512",
    "schedule.steps=4",
    "checkpoint.every=2",
    "checkpoint.keep=5",
]


def test_fsdp_and_tensor_parallelism_step_as_one_process_does(tmp_path):
    whole = train(tmp_path, "whole", 1, *OPTIONS, "parallel=single")
    sharded = train(tmp_path, "sharded", 2, *OPTIONS, "parallel=fsdp", WIRE)
    assert distance(weights(whole), weights(sharded)) <= 1e-4
    shutil.copytree(sharded, tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "step-0000004")
    on = train(tmp_path, "on", 2, *OPTIONS, "parallel=tp", WIRE)
    assert distance(weights(whole), weights(on)) <= 1e-4
