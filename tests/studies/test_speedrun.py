"""The offline speedrun, on a tiny model and shards that are already there."""

import json

import numpy as np
import pytest

from geon.data import write_bin
from geon.data.meta import Meta, ShardFile, SplitMeta, write_meta
from geon.studies import speedrun

pytestmark = pytest.mark.dist
SMALL = [
    "model.n_layer=1",
    "model.d_model=16",
    "model.n_head=2",
    "model.context=16",
    "data.batch_tokens=64",
    "data.val_tokens=256",
    "schedule.steps=4",
    "eval.every=2",
    "logger.every=2",
    "device=cpu",
]


def shards(folder):
    folder.mkdir()
    splits = {}
    for name, count in (("train", 2000), ("val", 500)):
        file = f"it_{name}_000000.bin"
        write_bin(folder / file, np.arange(count) % 97)
        splits[name] = SplitMeta((ShardFile(file, count),))
    write_meta(folder, Meta("uint16", 97, None, "test", None, splits))


def test_arms_are_trained_in_turn_and_raced_to_the_final_loss_of_adamw(tmp_path, capsys):
    shards(tmp_path / "shards")
    told = ["--size", "tiny", "--out", str(tmp_path), *SMALL, "sweep.arms.hybrid=null"]
    told += [f"data.dir={tmp_path / 'shards'}", f"output={tmp_path / 'runs'}"]
    assert speedrun.main(told) == 0
    found = json.loads((tmp_path / "results" / "speedrun_offline.json").read_text())
    assert list(found["runs"]) == ["adamw", "muon"]
    assert found["target"] == found["runs"]["adamw"]["last"]["val_loss"]
    assert [p["step"] for p in found["runs"]["muon"]["points"]] == [2, 4]
    assert found["runs"]["adamw"]["reached"]["step"] == 4
    assert (tmp_path / "speedrun_offline.png").exists()
    text = capsys.readouterr().out
    assert f"{tmp_path / 'shards'}: 2,000 train tokens, 500 val tokens" in text
    assert "| run | loss at its end |" in text
    cards = sorted((tmp_path / "runs").glob("*/card.md"))
    assert len(cards) == 2 and all(str(card) in text for card in cards)
