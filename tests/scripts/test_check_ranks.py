import subprocess

import pytest

from geon.launch.local import ROOT, torchrun_command
from geon.scripts import check_ranks
from geon.scripts.check_ranks import compare, table


def rank(host, **other):
    same = dict.fromkeys(check_ranks.ALIKE, "1.0")
    return {"host": host, **same, **other}


def test_the_rank_that_differs_is_named():
    ranks = [rank("a"), rank("b", torch="2.9"), rank("c"), rank("d", nccl="2.30")]
    assert compare(ranks, [0.0, 0.4, -0.4, 0.1]) == [
        "rank 1 (b): torch is 2.9, on most others 1.0",
        "rank 3 (d): nccl is 2.30, on most others 1.0",
    ]
    assert not compare([rank("a"), rank("b")], [5.0, 5.9])


def test_a_clock_more_than_a_second_off_is_named():
    ranks = [rank(host) for host in "abcde"]
    (line,) = compare(ranks, [100.0, 100.1, 107.5, 99.9, 100.0])
    assert line == "rank 2 (c): its clock is +7.5 s off"


def test_the_table_has_a_line_a_rank_and_the_rate_of_its_link():
    lines = table([rank("a"), rank("b")], [7.0, 7.25], [0.016, None]).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("0     a") and lines[1].endswith("16.00 ms, 0.98 GiB/s")
    assert lines[2].endswith("-0.00") or lines[2].endswith("+0.00")


@pytest.mark.dist
@pytest.mark.parametrize("broken", [False, True])
def test_ranks_are_compared_under_torchrun(tmp_path, broken):
    program = tmp_path / "job.py"
    program.write_text(
        "import os, sys\n"
        "from geon.launch.leave import leave\n"
        "from geon.scripts import check_ranks\n"
        f"if {broken} and os.environ['RANK'] == '1':\n"
        "    check_ranks.__version__ = '0.0'\n"
        "leave(check_ranks.main(['--device', 'cpu']))\n"
    )
    done = subprocess.run(
        torchrun_command(2 + broken, [], program),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) is not broken, done.stderr
    assert ("rank 1 " in done.stderr and "geon is 0.0" in done.stderr) is broken
    assert ("a sum of 16 MiB over 2 ranks" in done.stdout) is not broken
