"""Operators that a step dispatches: no step is faster than the host issues them."""

import pytest

from geon.benches.count_operators import make, operators, visited


@pytest.mark.parametrize(
    ("recipe", "most", "files"), [("muon", 120, 11), ("normuon", 160, 13), ("hybrid", 440, 16)]
)
def test_a_step_of_12_layers_dispatches_so_many_operators_in_so_many_files(recipe, most, files):
    optimizer = make(recipe, "cpu", 12, 64)
    optimizer.step()
    found = operators(optimizer)
    assert sum(found.values()) <= most
    assert found["bmm"] + found["baddbmm"] > 20  # it really orthogonalizes
    seen = visited(optimizer)
    assert len(seen) <= files, " ".join(seen)
