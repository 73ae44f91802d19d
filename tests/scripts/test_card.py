"""The rule over several seeds, and what must not be averaged."""

import json
import math

import pytest

from geon.scripts import card as cards
from tests.reliability.identity_job import train

LOSSES = (3.2770, 3.2790, 3.2774, 3.2782)
"""Mean 3.2779, squares of the distances 81, 121, 25, 9 times 1e-8: worked out by hand."""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The card of a run that was trained, evaluated after steps 4 and 8."""
    folder = train(tmp_path_factory.mktemp("runs"), "eval.every=4")
    return json.loads((folder / "card.json").read_text())


def write(root, real, losses=LOSSES, **more):
    folders = []
    for seed, loss in enumerate(losses):
        card = json.loads(json.dumps(real)) | {"seed": seed, "run": f"run{seed}"} | more
        card["config"]["seed"] = seed
        card["config"]["name"] = f"muon-{seed}"
        card["losses"][-1]["val_loss"] = loss
        folders.append(root / f"muon-{seed}")
        folders[-1].mkdir(parents=True)
        (folders[-1] / "card.json").write_text(json.dumps(card))
    return folders


def test_mean_sd_and_the_rule_are_those_worked_out_by_hand(tmp_path, real, capsys):
    folders = write(tmp_path, real)
    out = tmp_path / "out.json"
    assert cards.main([*map(str, folders), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["n"] == 4
    assert found["mean"] == pytest.approx(3.2779, abs=1e-12)
    assert found["sd"] == pytest.approx(math.sqrt(236e-8 / 3))
    assert found["evidence"] == pytest.approx(0.0042)
    assert found["holds"] and found["mean_needed"] == pytest.approx(3.278)
    text = capsys.readouterr().out
    assert "n 4, mean 3.27790, sd 0.00089" in text
    assert "(3.28 - 3.27790) * sqrt(4) = 0.00420 >= 0.004: the rule holds" in text


def test_one_run_has_no_sd_and_needs_3_276(tmp_path, real, capsys):
    folders = write(tmp_path, real, [3.2770])
    assert cards.main([str(folders[0])]) == 0
    text = capsys.readouterr().out
    assert "0.00300 < 0.004: the rule does not hold (it needs a mean of 3.27600 or less)" in text
    assert "sd" not in text


def test_another_common_step_may_be_looked_at(tmp_path, real, capsys):
    folders = [str(folder) for folder in write(tmp_path, real)]
    assert cards.main([*folders, "--step", "4", "--target", "4"]) == 0
    assert f"mean {real['losses'][0]['val_loss']:.5f}, sd 0.00000" in capsys.readouterr().out
    assert cards.main([*folders, "--step", "6"]) == 2
    assert "was evaluated after steps 4, 8, not after this" in capsys.readouterr().err


def test_runs_that_are_no_samples_of_one_experiment_are_refused(tmp_path, real, capsys):
    def refused(change):
        folders = write(tmp_path / str(len(list(tmp_path.iterdir()))), real, LOSSES[:2])
        card = json.loads((folders[1] / "card.json").read_text())
        change(card)
        (folders[1] / "card.json").write_text(json.dumps(card))
        assert cards.main([str(folder) for folder in folders]) == 2
        return capsys.readouterr().err

    assert "optim.lr is 0.02 in " in refused(lambda c: c["config"]["optim"].update(lr=0.3))
    assert "their sha256 differ" in refused(lambda c: c["data"].update(sha256="0"))
    assert "have the same seed 0" in refused(lambda c: c.update(seed=0))
    assert "data.val_tokens is" in refused(lambda c: c["config"]["data"].update(val_tokens=9))
    assert cards.main([str(tmp_path)]) == 2
    assert "holds no card.json" in capsys.readouterr().err
