"""The card of a run: what it says must be what was run, over a kill and a resume too."""

import json
import time

import pytest

from geon.engine import callbacks, card, history
from tests.reliability.identity_job import report, rows, train, train_until


def cards(folder):
    return json.loads((folder / card.CARD).read_text())


def test_a_card_says_what_was_run(tmp_path):
    folder = train(tmp_path, "eval.every=4", "seed=3")
    found, log = cards(folder), rows(folder, "eval")
    assert [row["step"] for row in found["losses"]] == [4, 8]
    assert [row["val_loss"] for row in found["losses"]] == [r["val_nats_per_token"] for r in log]
    assert found["losses"][0]["tokens"] == 4 * 128 and found["tokens"] == 8 * 128
    assert found["val_loss"] == found["losses"][-1]["val_loss"]
    assert (found["seed"], found["config"]["seed"], found["optim"]) == (3, 3, "muon")
    # embedding and head of 32 x 16, q, k, v, o of 16 x 16, up and down of 16 x 64
    assert found["model"]["parameters"] == 2 * 32 * 16 + 4 * 16 * 16 + 2 * 16 * 64
    assert found["run"] == history.read(folder).run
    text = (folder / card.PAGE).read_text()
    assert f"| 8 | 1,024 | {found['seconds']:.1f} | {found['val_loss']:.5f} |" in text
    assert "eval:\n  every: 4\n" in text and "| optimizer | muon |" in text


def test_a_resumed_run_has_one_card_with_all_of_it(tmp_path, monkeypatch):
    commits = iter(["1" * 40, "2" * 40 + "+"])
    monkeypatch.setattr(history, "_commit", lambda: next(commits))
    train_until(monkeypatch, 5, tmp_path, "eval.every=2")
    folder = train(tmp_path, "eval.every=2", "schedule.steps=10")
    found = cards(folder)
    assert [row["step"] for row in found["losses"]] == [2, 4, 6, 8, 10]
    seconds = [row["seconds"] for row in found["losses"]]
    assert seconds == sorted(seconds) and seconds[-1] <= found["seconds"]
    assert [(one["first"], one["last"]) for one in found["segments"]] == [(0, 4), (4, 10)]
    assert (found["commits"], found["dirty"]) == (["1" * 40, "2" * 40], True)
    assert found["settings_changed"] == ["schedule.steps"]
    assert found["config"]["schedule"]["steps"] == 10
    text = (folder / card.PAGE).read_text()
    assert "| segments | steps 0 to 4; steps 4 to 10 |" in text and "with changed files" in text


def test_the_clock_stands_while_a_run_is_evaluated(tmp_path, monkeypatch):
    evaluate = callbacks.evaluate

    def slow(*arguments):
        time.sleep(0.5)
        return evaluate(*arguments)

    monkeypatch.setattr(callbacks, "evaluate", slow)
    since = time.perf_counter()
    told = report(train(tmp_path, "eval.every=2"))
    assert time.perf_counter() - since > 2.0  # four evaluations
    assert told["train_seconds"] == pytest.approx(0, abs=1.5)
