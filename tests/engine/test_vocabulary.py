"""data.vocab_size=0: what a run, a plan and a checkpoint make of it."""

import json

import pytest

from geon.data.bpe import train_on
from geon.engine.checks import check
from geon.engine.main import execute
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.launch.jobs import SMALLEST

ROWS = [f"{i % 7} of {i % 5} ties, {i % 3} and {i % 2}.\n" for i in range(400)]


def config(tmp_path, *options):
    kept = [one for one in SMALLEST if one.split("=")[0] not in ("data", "data.tokens")]
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    told = ["data=text", f"data.path={rows}", f"output={tmp_path}", "parallel=single"]
    return compose([*kept, *told, "device=cpu", *options])


def test_it_becomes_the_number_of_ids(tmp_path):
    plain = config(tmp_path)
    assert (plain.data.vocab_size, plain.model.vocab_size) == (0, 0)
    check(plain, 1)
    assert (plain.data.vocab_size, plain.model.vocab_size) == (256, 256)
    wide = config(tmp_path, "model.vocab_size=512")
    check(wide, 1)
    assert (wide.data.vocab_size, wide.model.vocab_size) == (256, 512)
    with pytest.raises(UsageError, match="model.vocab_size 100 is below data.vocab_size 256"):
        check(config(tmp_path, "model.vocab_size=100"), 1)
    with pytest.raises(UsageError, match="model.vocab_size 0, and data.vocab_size is 256"):
        config(tmp_path, "data.vocab_size=256", "model.vocab_size=0")
    made = train_on(iter(ROWS), 280, ["<|endoftext|>"])
    (tmp_path / "tokenizer.json").write_text(made.serialise())
    named = config(tmp_path, f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    assert check(named, 1).model.shape.vocab_size == named.data.vocab_size == made.vocab_size


def test_a_run_goes_on_and_its_config_holds_the_number(tmp_path, capsys):
    options = ["data.bpe_vocab=300", "name=run", "schedule.steps=2", "schedule=constant"]
    execute(config(tmp_path, *options), Env())
    saved = (tmp_path / "run" / "config.yaml").read_text()
    size = check(config(tmp_path, *options), 1).corpus.vocab_size
    assert 256 < size <= 300
    assert saved.count(f"vocab_size: {size}\n") == 2
    execute(config(tmp_path, *options, "schedule.steps=3"), Env())
    assert "resuming from" in capsys.readouterr().out
    execute(config(tmp_path, *options, "mode=plan"), Env())
    assert f"{size} x " in capsys.readouterr().out
