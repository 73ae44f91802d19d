"""What goes wrong is told on every rank, within seconds, by the parameter's name."""

import pytest

from geon.launch.local import ROOT, torchrun_command
from tests.distributed.jobs import launch

pytestmark = pytest.mark.dist


def told(folder, *faults):
    """(seconds, message) of each rank that lived to tell, by fault."""
    program = ROOT / "tests" / "distributed" / "fault_job.py"
    launch(torchrun_command(2, [str(folder), *faults], program), timeout=100)
    found = {fault: {} for fault in faults}
    for fault, ranks in found.items():
        for file in sorted(folder.glob(f"{fault} [01]")):
            seconds, message = file.read_text().split("\n", 1)
            ranks[int(file.name[-1])] = (float(seconds), message)
    return found


LAYOUTS = {
    "other plan": ["parameter 'blocks.0.up.weight' differs on rank 1 from rank 0"],
    "other model": ["parameter 'blocks.0.up.weight' differs on rank 1 from rank 0"],
    "mesh in another order": ["'blocks.0.up.weight'", "are not in ascending order"],
    "unknown layout": ["parameter 'blocks.0.up.weight' has placements (Partial(sum),)"],
    "two meshes": ["parameter 'blocks.0.up.weight' lies on", "slices of one root mesh"],
    "sharded afterwards": ["no parameter of the optimizer has a gradient in its first step"],
}


@pytest.fixture(scope="module")
def layouts_told(tmp_path_factory):
    """A rank that is refused is well: one pair of processes tries them all."""
    return told(tmp_path_factory.mktemp("layouts"), *LAYOUTS)


@pytest.mark.parametrize("fault", list(LAYOUTS))
def test_bad_layouts_are_one_message_on_every_rank(layouts_told, fault):
    found = layouts_told[fault]
    assert set(found) == {0, 1}
    for seconds, message in found.values():
        assert message.startswith("UsageError: "), message
        assert all(word in message for word in LAYOUTS[fault]), message
        assert seconds < 15


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_others_with_the_collective_and_the_bucket(tmp_path, fault):
    seconds, message = told(tmp_path, fault)[fault][0]
    assert message.startswith("ExchangeError: rank 0: the "), message
    assert "(all_to_all_single) of bucket 0 of 1 (1 matrices by owner" in message
    assert "first 'blocks.0.up.weight')" in message
    assert "parallel.timeout_seconds" in message
    assert seconds < 15


def test_a_rank_that_is_gone_before_the_gradients_are_compared(tmp_path):
    seconds, message = told(tmp_path, "dies before")["dies before"][0]
    assert message.startswith("ExchangeError: rank 0: the reduction of gradient norms"), message
    assert "parallel.timeout_seconds" in message
    assert seconds < 15
