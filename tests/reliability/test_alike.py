"""Ranks of one job that differ are refused before the first step, in the same words on each."""

import json

import pytest

from geon.launch.local import ROOT
from tests.distributed.jobs import by_file

pytestmark = pytest.mark.dist

WORDS = {
    "rate": "optim.lr is 0.02 on rank 0 and 0.5 on rank 1, and 1 more differ",
    "data": "data.tokens is 6000 on rank 0 and 5000 on rank 1",
    "precision": "parallel.precision is auto on rank 0 and bf16 on rank 1; start",
    "seed": "seed is 0 on rank 0 and 9 on rank 1",
    "batch": "data.batch_tokens is 128 on rank 0 and 256 on rank 1",
    "version": "version of torch is",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two ranks were told, by what they differed in."""
    folder = tmp_path_factory.mktemp("alike")
    return folder, by_file(2, ROOT / "tests" / "reliability" / "alike_job.py", folder)


@pytest.mark.parametrize("odd", list(WORDS))
def test_ranks_that_differ_are_told_key_and_values(told, odd):
    folder, (first, second) = told
    assert first[odd] == second[odd]
    assert "ranks of one job differ" in first[odd] and WORDS[odd] in first[odd], first[odd]
    assert not (folder / odd).exists()


def test_ranks_that_are_alike_train(told):
    folder, ranks = told
    assert [rank["none"] for rank in ranks] == ["trained", "trained"]
    report = json.loads((folder / "none" / "report.json").read_text())
    assert report["segments"][0]["ranks"] == 2
