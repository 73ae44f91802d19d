"""evaluate, export_hf and generate on one trained run, beside what the trainer found."""

import json

import numpy as np
import pytest
import torch

from geon.data import text_corpus, write_bin
from geon.engine.saved import open_saved
from geon.scripts import evaluate, export_hf, generate
from tests.distributed.jobs import TINY, metrics, train

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    rng = np.random.default_rng(0)
    words = ["caf\u00e9", "tree", "of", "rules", "and\n", "so"]
    file.write_text(" ".join(rng.choice(words, 6000)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    options = ["data=text", f"data.path={text}", "data.vocab_size=256", "schedule.steps=6"]
    options += ["model.gains=true", "model.activation_scale=2", "eval.batch=5"]
    kept = [one for one in TINY if not one.startswith(("data.tokens", "data=", "schedule"))]
    return train(tmp_path_factory.mktemp("runs"), "words", 1, *kept, *options)


def found(tmp_path, *arguments):
    file = tmp_path / "found.json"
    assert evaluate.main([*map(str, arguments), "--device", "cpu", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_the_runs_own_text_gives_the_trainers_number(run, tmp_path, capsys):
    last = metrics(run, "eval")[-1]
    one = found(tmp_path, run)
    for key in ("val_tokens", "val_nats_per_token", "val_nats_per_byte"):
        assert one[key] == pytest.approx(last[key], rel=1e-6)
    assert one["val_bits_per_byte"] == pytest.approx(last["val_nats_per_byte"] / np.log(2))
    assert f"{one['val_bits_per_byte']:.5f} bits/byte" in capsys.readouterr().out


def test_the_same_text_as_a_file_or_a_shard_gives_the_same_number(run, text, tmp_path):
    last, val = metrics(run, "eval")[-1], text_corpus(str(text), 10.0).val_text
    (tmp_path / "val.txt").write_bytes(val)
    write_bin(tmp_path / "val.bin", np.frombuffer(val, np.uint8))
    for name in ("val.txt", "val.bin"):
        one = found(tmp_path, run, "--data", tmp_path / name, "--tokens", last["val_tokens"])
        assert one["val_nats_per_byte"] == pytest.approx(last["val_nats_per_byte"], rel=1e-6)
        assert found(tmp_path, run, "--data", tmp_path / name)["val_tokens"] > one["val_tokens"]


@torch.no_grad()
def test_other_text_is_read_whole(run, tmp_path):
    """Two documents, each behind a byte 0: the mean over windows, by a forward pass of ours."""
    (tmp_path / "more").mkdir()
    for name in ("a", "b"):
        (tmp_path / "more" / f"{name}.txt").write_text(f"{name} tree of rules\n" * 9)
    one = found(tmp_path, run, "--data", tmp_path / "more")
    whole = b"".join(b"\0" + f"{name} tree of rules\n".encode() * 9 for name in "ab")
    count = (len(whole) - 1) // 64 * 64
    ids = torch.tensor(list(whole[: count + 1]))
    model = open_saved(run).model
    rows = model(ids[:-1].view(-1, 64)).log_softmax(-1).flatten(0, 1)
    nats = -rows[torch.arange(count), ids[1:]].mean()
    assert one["val_tokens"] == count
    assert one["val_nats_per_byte"] == pytest.approx(float(nats), rel=1e-5)


def test_what_cannot_be_evaluated_is_one_line(run, text, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    write_bin(tmp_path / "big.bin", np.full(200, 256, np.uint16))
    for name, said in (
        ("short.txt", "do not fill one window"),
        ("big.bin", "token id 256 at position 0"),
        ("none", "does not exist"),
    ):
        assert evaluate.main([str(run), "--data", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    kept = text.read_text(encoding="utf-8")
    try:
        text.write_text(kept.replace("tree", "free"), encoding="utf-8")
        assert evaluate.main([str(run)]) == 2
        assert "is other data than" in capsys.readouterr().err
    finally:
        text.write_text(kept, encoding="utf-8")


def test_the_exported_run_says_what_generate_says(run, tmp_path, capsys):
    hf = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert export_hf.main([str(run), "--out", str(out)]) == 0
    assert f"{out}: {run}/checkpoints/step-0000006" in capsys.readouterr().out
    page = (out / "README.md").read_text()
    assert page.startswith("---\nlibrary_name: transformers\n")
    assert "Weights of step 6" in page
    assert "| validation loss |" in page
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    ids = model.generate(
        **tokenizer("tree", return_tensors="pt"), max_new_tokens=12, do_sample=False
    )
    flags = ["--tokens", "12", "--temperature", "0", "--device", "cpu", "--prompt", "tree"]
    assert generate.main([str(run), *flags]) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids[0]) + "\n"
    assert export_hf.main([str(run), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
