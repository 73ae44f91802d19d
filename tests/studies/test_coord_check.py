"""A small coordinate check: what passes at full size passes, and the control fails."""

import pytest
import torch

from geon.launch.compose import compose
from geon.studies import coord_check

SIZE = ["data=synthetic", "data.tokens=60000"]
WIDTHS, SEEDS, UPDATES = (32, 64, 128, 256), (0,), 6


@pytest.mark.parametrize("optim", ["hybrid", "scion"])
def test_activations_keep_their_size_over_widths(optim):
    found = coord_check.check([*SIZE, *coord_check.ARMS[optim]], WIDTHS, SEEDS, UPDATES)
    assert coord_check.passes(found), coord_check.table({optim: found})
    assert not coord_check.control_fails(found)


def test_the_control_fails():
    found = coord_check.check([*SIZE, *coord_check.ARMS["adamw"]], WIDTHS, SEEDS, UPDATES)
    assert coord_check.control_fails(found), coord_check.table({"adamw": found})
    assert not coord_check.passes(found)


def test_slope_is_the_exponent():
    assert coord_check.slope(
        [32, 64, 128], [5.0 * w**0.75 for w in (32, 64, 128)]
    ) == pytest.approx(0.75)


def test_every_arm_names_settings_that_exist():
    for overrides in coord_check.ARMS.values():
        compose([*coord_check.BASE, *overrides])


def test_changes_are_those_of_the_activations_on_one_batch():
    config = compose([*coord_check.BASE, *SIZE])
    corpus = coord_check.make_corpus(config.data, 0)
    frozen = ["optim.lr=0", "optim.rest.lr=0"]
    sizes = coord_check.trace([*SIZE, "model.d_model=32", *frozen], 2, corpus)
    for rms, change in sizes.values():
        assert change == [0.0, 0.0]
        assert torch.tensor(rms).unique().numel() == 1
