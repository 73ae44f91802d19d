import json
import re

import pytest
import torch

from geon.studies import gallery

DOCS = gallery.ROOT / "docs"
BOARD = json.loads((DOCS / "results" / "leaderboard.json").read_text())


def rows(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if "configs/optim" in line]
    return {re.match(r"\[(\w+)\]", row[0])[1]: row for row in cells}


def test_the_document_holds_the_table_that_the_script_prints():
    assert gallery.table(BOARD) in (DOCS / "optimizers.md").read_text()


def test_every_recipe_has_a_row():
    assert set(rows(gallery.table(BOARD))) == {file.stem for file in gallery.RECIPES.glob("*.yaml")}


def test_measured_columns_are_those_of_the_result_file():
    found = rows(gallery.table(BOARD))
    assert found["muon"][3:7] == ["5.00", "10%", "3", "1.426 ± 0.010"]
    assert found["sgd"][5] == "25"
    better = {**BOARD, "sgd": {**BOARD["sgd"], "loss": 0.5}}
    assert rows(gallery.table(better))["sgd"][5] == "1"


def test_norm_and_manifold_are_the_recipes():
    assert gallery.pair("manifold_muon") == "spectral x stiefel"
    assert gallery.pair("lion") == gallery.pair("adamw") == ""


def test_sgd_walks_as_by_hand():
    """Along u2 v2' each step multiplies by 1 - lr, along u1 v1' by 1 - 100 lr."""
    way, end = gallery.walk("sgd", 0.01)
    rates = [0.01 * (1 - step / gallery.STEPS) for step in range(gallery.STEPS)]
    flat = torch.tensor([1 - rate for rate in rates]).prod()
    assert way[-1, 1, 1].item() == pytest.approx(float(flat), rel=1e-4)
    assert abs(way[-1, 0, 0].item()) < 1e-5
    assert end == pytest.approx(0.5 * float(flat) ** 2, rel=1e-3)


def test_muon_moves_both_directions_alike_from_the_first_step():
    way, _ = gallery.walk("muon", 0.125)
    first = way[1] - way[0]
    assert first[0, 0].item() == pytest.approx(first[1, 1].item(), rel=0.5)
    assert way[1][0, 1].item() == pytest.approx(0, abs=1e-3)
