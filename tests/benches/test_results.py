"""The writer of result files, and the files that are kept."""

import json
import math
import re

import pytest

from geon.benches import results, solver
from geon.launch.local import ROOT

FILES = sorted((ROOT / "docs" / "results").glob("*.json"))
ROWS = [
    {"solver": "lgm", "form": "gram", "dtype": "fp32", "case": f"pairs/w/{i}", "d_out": sides[0],
     "d_in": sides[1], "rho": 0.9 + i / 100, "tangency": i * 1e-7, "spectral_norm": 1.0 + i / 10,
     "fallbacks": i % 2, "n3": 97.25, "n3_symmetric_half": 66.0, "n3_muon": 45.0,
     "seconds": 0.5, "over_muon": 2.0, "batch": 1}
    for i, sides in enumerate([(8, 2), (2, 8), (8, 2), (2, 2)])
]  # fmt: skip


def test_floats_keep_five_digits_and_nothing_else_changes(tmp_path):
    content = {"a": 1.23456789, "b": -4.5678901e-9, "tokens": 15925248.0, "n": 123456789,
               "text": "1.23456789", "none": None, "yes": True, 32: [0.1, [2 / 3]]}  # fmt: skip
    results.write(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": 1.2346, "b": -4.5679e-9, "tokens": 15925248, "n": 123456789,
        "text": "1.23456789", "none": None, "yes": True, "32": [0.1, [0.66667]]}  # fmt: skip
    assert math.isnan(json.loads(results.text_of({"x": math.nan}))["x"])


def test_rows_have_a_line_each_and_values_none():
    content = {"meta": {"a": 1}, "rows": [{"b": [1, 2]}, {"b": [3]}], "arms": {"x": {"c": {}}}}
    lines = ['{', '"meta": {"a":1},', '"rows": [', ' {"b":[1,2]},', ' {"b":[3]}', '],',
             '"arms": {', ' "x": {"c":{}}', '}', '}', '']  # fmt: skip
    assert results.text_of(content) == "\n".join(lines)


def test_a_table_gives_its_rows_back():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    text = results.text_of({"found": results.table(rows)})
    assert results.rows_of(json.loads(text)["found"]) == rows
    assert len(text.splitlines()) == 2 + 2 + 1 + 1 + len(rows) + 1
    assert results.rows_of(results.table([])) == []


def test_sums_of_solvers_by_hand():
    told = solver.sums(ROWS)
    square, long = sorted(results.rows_of(told["quality"]), key=lambda row: row["long"])
    assert (long["solver"], long["case"], long["short"], long["long"]) == (
        "lgm gram fp32", "pairs", 2, 8)  # fmt: skip
    assert (long["problems"], long["fallbacks"], square["problems"]) == (3, 1, 1)
    assert [long[key] for key in ("rho_min", "rho_median", "rho_max")] == pytest.approx(
        [0.90, 0.91, 0.92]
    )
    assert (long["tangency"], long["spectral_norm"]) == (2e-7, 1.2)
    costs = results.rows_of(told["costs"])
    assert [(row["d_out"], row["d_in"]) for row in costs] == [(8, 2), (2, 8), (2, 2)]
    assert {row["n3"] for row in costs} == {97.25}


def test_the_kept_files_are_small_and_all_from_one_writer():
    assert sum(file.stat().st_size for file in FILES) < 150_000
    for file in FILES:
        text = file.read_text("utf-8")
        assert text == results.text_of(json.loads(text)), f"{file.name} is not from results.write"


def test_every_kept_file_is_named_by_a_document():
    documents = "\n".join(file.read_text("utf-8") for file in (ROOT / "docs").glob("*.md"))
    documents += (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"results/(\w+\.json)", documents))
    assert {file.name for file in FILES} <= named | {"operators_gpu.json", "speedrun_offline.json"}
