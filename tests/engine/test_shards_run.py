"""A run on shards with their tokenizer beside them: nats a byte, samples, generate, resume."""

import json

import pytest

from geon.data.codec import load_codec
from geon.engine import checkpoint
from geon.engine.checks import check
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.scripts import generate
from tests.data.test_folder import made
from tests.distributed.jobs import report, train
from tests.launch.jobs import SMALLEST

pytestmark = pytest.mark.dist

OPTIONS = ["data=bins", "data.vocab_size=300", "data.batch_tokens=256", "model.context=32"]


def test_shards_with_a_tokenizer_are_text(tmp_path, capsys):
    shards, moved = tmp_path / "shards", tmp_path / "moved"
    _, codec, ids = made(shards, "bpe")
    options = [*OPTIONS, "schedule.steps=4", "eval.sample_tokens=12", "data.val_tokens=256"]
    folder = train(tmp_path, "text", 2, *options, f"data.dir={shards}", "parallel=ddp")
    facts = report(folder)
    size = len(codec.decode(ids[1:257].tolist()))
    assert facts["val_bytes"] == size
    assert facts["val_nats_per_byte"] * size == pytest.approx(facts["val_nats_per_token"] * 256)
    assert facts["data"]["tokenizer"] == codec.fingerprint
    assert (folder / "sample.txt").read_text().startswith("def ")
    commit = checkpoint.read_commit(checkpoint.candidates(folder)[0])
    assert load_codec(commit["codec"]).serialise() == codec.serialise()
    assert generate.main([str(folder), "--tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("def ")

    shards.rename(moved)  # the same data elsewhere: the run goes on
    globs = [f"data.train={moved}/*_train_*.bin", f"data.val={moved}/*_val_*.bin"]
    again = train(tmp_path, "text", 1, *options, *globs, "schedule.steps=6", "parallel=single")
    assert report(again)["steps"] == 6
    (moved / "meta.json").unlink()
    kept = [one for one in SMALLEST if one.split("=")[0] not in ("data", "data.tokens")]
    with pytest.raises(UsageError, match="eval.sample_tokens 12: the text of these ids is not"):
        check(compose([*kept, *options, *globs, f"output={tmp_path}"]), 1)
    stamps = sorted(moved.glob(".*.ids.json"))
    assert [json.loads(stamp.read_text())["max"] < 300 for stamp in stamps] == [True] * 3
