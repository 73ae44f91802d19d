"""The study of fine-tuning at a size of seconds: what it holds apart, tries, keeps and tells."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from geon.data import Split
from geon.studies import finetune, finetune_base

pytest.importorskip("transformers")
SIZES = {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 64, "steps": 4}
SIZES |= {"base-batch": 64, "base-steps": 8}
SIZE = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
ARMS = ("adamw", "hybrid")
LIBRARY_TEXTS = finetune_base.texts


def report(folder):
    """The result file of a small study whose runs lie in a folder."""
    file = folder / "report.json"
    words = ["--json", str(file), "--output", str(folder / "runs"), "--seeds", "2"]
    assert finetune.main([*SIZE, "--arms", *ARMS, *words]) == 0
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study that has run, on short texts in place of the library's."""
    words = b"for each of the words in a line: a letter follows a letter, and so on and on. "
    split = Split("text", [np.frombuffer(words * 4, np.uint8)])
    names = ("code", "code held out", "topics", "topics held out")
    made = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_base, "texts", lambda: dict.fromkeys(names, split))
        report(made)
        yield made


@pytest.fixture
def found(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_tries_as_much_and_runs_its_best_under_every_seed(found, arm):
    own, rows = found["arms"][arm], [row for row in found["rows"] if row["arm"] == arm]
    search = [row for row in rows if row["seed"] == 0]
    assert len(search) == 9 and len({row["lr"] for row in search}) == 6
    assert own["losses"][0] == min(row["loss"] for row in search)
    assert [own["losses"][1]] == [row["loss"] for row in rows if row["seed"] == 1]
    assert own["loss"] == pytest.approx(sum(own["losses"]) / 2, rel=1e-4)
    before = [row["loss"] for row in found["base"]]
    pairs = zip(own["losses"], before, strict=True)
    assert all(loss < start < math.log(256) for loss, start in pairs)
    assert f"| {arm} | {own['loss']:.4f} |" in finetune.table(found)


def test_other_rates_follow_the_rate_and_decay_is_searched(found):
    rows = [row for row in found["rows"] if row["arm"] == "hybrid"]
    for row in rows:
        point = finetune.Point(row["lr"], row["others"], row["decay"])
        settings, scale = point.settings(finetune.ARMS["hybrid"]), row["lr"] * row["others"]
        assert settings["embedding.lr"] == pytest.approx(scale)
        assert settings["rest.lr"] == pytest.approx(scale * 0.003 / 0.04)
        assert settings["hidden.weight_decay"] == 0.4 * row["decay"]
        assert settings["overrides.qk.weight_decay"] == 0.1 * row["decay"]
    assert {row["others"] for row in rows} == {0.25, 1.0, 4.0}
    assert {row["decay"] for row in rows} == {0.0, 1.0}


def test_torchs_own_adamw_ends_where_the_recipe_does(found):
    (own,) = (row["loss"] for row in found["rows"] if row["arm"] == "adamw-torch")
    assert own == found["arms"]["adamw"]["losses"][0]


def test_only_what_has_a_manifold_is_moved_before_the_first_step(folder, found):
    def exact(name):  # the result file is rounded
        return json.loads((folder / "runs" / f"{name}.json").read_text())["loss"]

    before = [row["loss"] for row in found["base"]]
    for seed, projected in enumerate(found["arms"]["adamw"]["projected"]):
        assert projected["moved"] == {} and projected["loss"] == before[seed]
    for seed, projected in enumerate(found["arms"]["hybrid"]["projected"]):
        assert {name.split(".")[-2] for name in projected["moved"]} == {"q_proj", "k_proj"}
        assert all(0.05 < by < 1.0 for by in projected["moved"].values())
        assert exact(f"projected-hybrid-{seed}") != exact(f"base-{seed}")


def test_the_result_file_tells_the_command_and_no_folder(folder, found):
    assert str(folder) not in (folder / "report.json").read_text()
    assert found["meta"]["command"].endswith(" ".join([*SIZE, "--arms", *ARMS, "--seeds 2"]))


def test_what_has_finished_is_not_run_again(folder, found, monkeypatch, capsys):
    (folder / "runs" / "adamw-0.001-1-1-0.json").unlink()
    train, steps = finetune_base.train, []
    monkeypatch.setattr(finetune_base, "train", lambda *to: (steps.append(to[-1]), train(*to)))
    again = report(folder)
    assert steps == [SIZES["steps"]]
    assert (again["base"], again["arms"]) == (found["base"], found["arms"])
    assert finetune.main([*SIZE, "--output", str(folder / "runs"), "--steps", "5"]) == 2
    assert "runs of other sizes" in capsys.readouterr().err


def test_no_text_is_trained_on_that_is_held_out():
    from pydoc_data import topics

    texts = {name: one.segments[0].tobytes() for name, one in LIBRARY_TEXTS().items()}
    source = Path(topics.__file__).read_bytes()
    assert not any(source[:20_000] in texts[name] for name in ("code", "code held out"))
    known = {part.strip() for part in texts["topics"].replace(b"\0", b"\n\n").split(b"\n\n")}
    held = texts["topics held out"].replace(b"\0", b"\n\n").split(b"\n\n")
    assert len(held) > 100 and not known & {part.strip() for part in held if part.strip()}
    assert len(texts["code"]) > 10 * len(texts["topics"])
    assert 0.05 < len(texts["topics held out"]) / len(texts["topics"]) < 0.3
