"""A stream over kills, resumes and other ranks: each batch and each bit as uninterrupted."""

import json

import numpy as np
import pytest
import torch

from geon.configs.schema import ParallelConfig
from geon.engine import checkpoint, streaming
from geon.engine.main import execute
from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.data.test_stream import batches, folder, json_places  # noqa: F401 - a fixture
from tests.distributed.jobs import TINY, metrics, weights
from tests.reliability.test_stretches import stretch

OPTIONS = [
    "data=stream",
    "data.tokens=0",
    "data.vocab_size=256",
    "data.streams=4",
    "data.buffer=8",
    "data.val_tokens=128",
    "data.val_percent=20",
    "data.batch_tokens=256",
    "model.context=16",
    "model.n_layer=1",
    "schedule.steps=12",
    "checkpoint.every=3",
    "logger.every=1",
]


def read(path):
    """First tokens of a step's batch, each time that it was read by all ranks."""
    parts, found = {}, {}
    for line in path.read_text().splitlines():
        step, rank, world, first = json.loads(line)
        part = parts.setdefault((step, world), {})
        part[rank] = first
        if len(part) == world:
            found.setdefault(step, []).append([token for r in range(world) for token in part[r]])
            del parts[step, world]
    return found


@pytest.mark.row("R18")
@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_and_reads_the_same_on_other_ranks(folder, tmp_path):  # noqa: F811
    options = [*OPTIONS, f"data.dataset={folder}", "parallel=ddp"]
    stretch(tmp_path, "whole", 2, *options)
    stretch(tmp_path, "torn", 2, *options, dies=7)
    assert not (tmp_path / "torn" / "report.json").exists()
    stretch(tmp_path, "torn", 2, *options)
    whole, torn = weights(tmp_path / "whole"), weights(tmp_path / "torn")
    assert whole.keys() == torn.keys()
    assert all(torch.equal(whole[name], torn[name]) for name in whole)
    rows = [metrics(tmp_path / name, "train") for name in ("whole", "torn")]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    stretch(tmp_path, "alone", 1, *options[:-1], "parallel=single", "schedule.steps=7")
    stretch(tmp_path, "alone", 2, *options)
    expected = {step: times[0] for step, times in read(tmp_path / "whole.notes").items()}
    assert sorted(expected) == list(range(12)) and len(expected[0]) == 16
    for name in ("torn", "alone"):
        found = read(tmp_path / f"{name}.notes")
        assert sorted(found) == list(range(12))
        assert all(one == expected[step] for step, times in found.items() for one in times)


def test_places_of_all_parts_are_in_a_checkpoint_and_taken_from_it(folder, tmp_path):  # noqa: F811
    class Two(Parallel):
        def gather(self, content):
            return [content, batches(folder, 1, 2).places_at(5)]

    pair = Two(ParallelConfig(), Env(), torch.device("cpu"))
    saved = json.loads(json.dumps(streaming.facts(batches(folder, 0, 2), 5, pair)))
    assert saved["streams"] == 4 and sorted(saved["places"]) == ["0", "1", "2", "3"]
    expected = batches(folder)
    again = streaming.resumed(batches(folder, begin=(5, 40)), tmp_path, {"stream": saved})
    assert torch.equal(again.windows_at(6), expected.windows_at(6))
    assert again.places == json_places(saved["places"])
    with pytest.raises(UsageError, match="set data.streams=4"):
        streaming.resumed(batches(folder, parts=2), tmp_path, {"stream": saved})
    del saved["places"]["2"]
    with pytest.raises(UsageError, match="does not say where all of its stream stood"):
        streaming.resumed(batches(folder), tmp_path, {"stream": saved})
    assert streaming.resumed(batches(folder), tmp_path, {"stream": None}).places is None


def run(folder, name, *options):  # noqa: F811
    words = [text for text in TINY if not text.startswith("data")]
    words += [*options, f"output={folder}", f"name={name}", "parallel=single"]
    execute(compose(words, "train"), Env())
    return folder / name


def test_a_stream_trains_reports_and_says_what_it_was(folder, tmp_path, capsys):  # noqa: F811
    options = [*OPTIONS, f"data.dataset={folder}", "data.workers=0"]
    found = run(tmp_path, "run", *options, "schedule.steps=6", "checkpoint.every=0")
    report = json.loads((found / "report.json").read_text())
    assert report["data"]["files"] == 3 and report["data"]["streams"] == 4
    assert report["val_nats_per_byte"] == report["val_nats_per_token"] < 6
    facts = checkpoint.read_commit(checkpoint.find(found))
    assert sorted(facts["stream"]["places"]) == ["0", "1", "2", "3"]
    assert facts["codec"] == "bytes"
    with pytest.raises(UsageError, match="data.streams is 4 in"):
        run(tmp_path, "run", *options, "schedule.steps=8", "data.streams=2")
    (folder / "3.jsonl").write_text('{"id": 1, "text": "another document"}\n')
    try:
        with pytest.raises(UsageError, match="data.sha256"):
            run(tmp_path, "run", *options, "schedule.steps=8")
    finally:
        (folder / "3.jsonl").unlink()
    capsys.readouterr()


def test_a_mixture_tells_the_loss_of_each_source_and_of_all_by_weight(tmp_path, capsys):
    (tmp_path / "prose").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        text = bytes(rng.integers(97, 101, 400).tolist())
        (tmp_path / "prose" / f"{i}.txt").write_bytes(text)
        (tmp_path / f"{i}.txt").write_bytes(text.swapcase())
    (tmp_path / "caps").mkdir()
    for file in tmp_path.glob("*.txt"):
        file.rename(tmp_path / "caps" / file.name)
    entries = [f"{name}: {{weight: {weight}, source: text, path: {tmp_path}/{name}}}"
               for name, weight in (("prose", 3), ("caps", 1))]  # fmt: skip
    mix = "data.mix={" + ", ".join(entries) + "}"
    options = ["data=mix", mix, "data.val_percent=30", "data.val_tokens=256"]
    options += ["data.batch_tokens=256", "model.context=16", "schedule.steps=3", "eval.every=2"]
    found = run(tmp_path, "run", *options)
    rows = metrics(found, "eval")
    assert len(rows) == 2
    for row in rows:
        parts = [row[f"val_nats_per_token.{name}"] for name in ("prose", "caps")]
        assert row["val_nats_per_token"] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])
        assert row["val_tokens"] == sum(row[f"val_tokens.{n}"] for n in ("prose", "caps")) == 512
        assert parts[0] != parts[1]
    assert "  caps " in capsys.readouterr().out
    with pytest.raises(UsageError, match="data.mix.prose.weight is 3.0 in"):
        run(tmp_path, "run", *[one.replace("weight: 3", "weight: 2") for one in options],
            "schedule.steps=4")  # fmt: skip
