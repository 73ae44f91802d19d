"""What `tokenize` does with a folder that holds something, and what its tokenizer learns from."""

import json
import re
import shlex

import pytest

from geon.configs.schema import DataConfig, Source
from geon.data import prepare
from geon.data.bpe import train_on
from geon.data.documents import parts
from geon.data.prepare import Job, tokenize
from geon.data.stream import held_out
from geon.engine.build import make_corpus
from geon.engine.evaluate import val_bytes
from geon.errors import UsageError
from geon.scripts import prepare_data

TEXTS = [f"<{i}> of ties and lies\n" * (1 + i % 5) for i in range(60)]


@pytest.fixture
def source(tmp_path):
    """A folder of text files."""
    folder = tmp_path / "src"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


def job(source, tokenizer, **changes):
    fields = {"val_percent": 20.0, "shard_tokens": 1024} | changes
    return Job(parts([str(source)]), "src", str(tokenizer), **fields)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_dir()}


def test_a_refused_command_leaves_the_folder_as_it_was(source, tmp_path):
    """Also one whose tokenizer.json has another content under the same name."""
    tokenizer, out = tmp_path / "tokenizer.json", tmp_path / "out"
    out.mkdir()
    tokenizer.write_text(train_on(iter(TEXTS), 300, ["<|endoftext|>"]).serialise())
    tokenize(job(source, tokenizer), out, 1)
    before = content(out)
    tokenizer.write_text(train_on(iter(TEXTS), 290, ["<|endoftext|>"]).serialise())
    for other in (job(source, tokenizer), job(source, "train:300"), job(source, "/nowhere")):
        with pytest.raises(UsageError, match=r"fingerprint was|tokenizer was|no such file"):
            tokenize(other, out, 1)
        assert content(out) == before


@pytest.mark.parametrize("name", ["tokens_train_000001.bin", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("resume", [True, False])
def test_files_that_no_journal_names_are_not_touched(source, tmp_path, name, resume):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds a {name} of something else"):
        tokenize(job(source, "train:300"), out, 1, resume)
    assert content(out) == {name: b"mine"}


def test_a_tokenizer_of_its_own_folder_is_read_before_the_folder_is_cleared(source, tmp_path):
    tokenize(job(source, "train:300"), tmp_path, 1)
    known = (tmp_path / "tokenizer.json").read_bytes()
    done = tokenize(job(source, tmp_path / "tokenizer.json"), tmp_path, 1, resume=False)
    assert (tmp_path / "tokenizer.json").read_bytes() == known
    assert done.meta.vocab_size == 300


def test_a_trained_tokenizer_that_changes_is_refused(source, tmp_path):
    tokenize(job(source, "train:300"), tmp_path, 1)
    other = train_on(iter(TEXTS), 290, ["<|endoftext|>"]).serialise()
    (tmp_path / "tokenizer.json").write_text(other)
    with pytest.raises(UsageError, match="has changed since it was trained"):
        tokenize(job(source, "train:300"), tmp_path, 1)


def test_a_tokenizer_learns_from_training_documents_alone(source, tmp_path, monkeypatch):
    """Also of a large file, whose later parts go with its first text."""
    monkeypatch.setattr("geon.data.documents.PART", 4000)
    monkeypatch.setattr("geon.data.documents.PIECE", 1000)
    splits = set()
    for i in range(20):
        text = "".join(f"{i} large {line:03}\n" for line in range(900))
        (source / f"large{i:02}.txt").write_text(text)
        splits.add(held_out(text[: text.rfind("\n", 0, 1000) + 1], 2000))
    assert splits == {True, False}
    seen = []

    def learn(texts, size, special):
        seen.extend(texts)
        return train_on(iter(seen), size, special)

    monkeypatch.setattr("geon.data.bpe.train_on", learn)
    done = tokenize(job(source, "train:300"), tmp_path, 1)
    assert sum(len(text) for text in seen) == done.meta.splits["train"].bytes
    assert not {text for text in TEXTS if held_out(text, 2000)} & set(seen)


def test_too_few_documents_are_told_another_percentage(source, tmp_path):
    for path in list(source.iterdir())[4:]:
        path.unlink()
    with pytest.raises(UsageError, match=r"none of 4 documents.*e\.g\. 50, with --resume never"):
        tokenize(job(source, "bytes", val_percent=0.01), tmp_path, 1)
    assert json.loads((tmp_path / ".tokenize.json").read_text())["done"] is False


def test_the_percentage_that_is_told_is_larger_than_the_one_that_failed(
    source, tmp_path, monkeypatch
):
    held = prepare.held_out
    monkeypatch.setattr(prepare, "held_out", lambda text, share: False)
    for refused in (0.01, 5.0):
        with pytest.raises(UsageError, match=r"none of 60 documents") as error:
            tokenize(job(source, "bytes", val_percent=refused), tmp_path, 1, resume=False)
        told = float(re.search(r"e\.g\. (\d+)", str(error.value)).group(1))
        assert refused < told <= 50
        assert refused < 1 or any(held(text, round(100 * told)) for text in TEXTS)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_sources_without_text_are_said_to_hold_none(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match="src holds no text: choose other sources"):
        tokenize(job(tmp_path / name, "bytes"), tmp_path, 1)


@pytest.mark.parametrize("word", ["word ", "word"])
def test_a_file_of_one_long_line_trains_and_validates(tmp_path, word):
    text = word * 20_000
    (tmp_path / "one.txt").write_text(text)
    done = tokenize(job(tmp_path / "one.txt", "bytes", val_percent=5.0), tmp_path, 1)
    sizes = {name: split.bytes for name, split in done.meta.splits.items()}
    assert sum(sizes.values()) == len(text)
    assert sizes["val"] == pytest.approx(0.05 * len(text), rel=0.3)


def test_the_same_files_from_another_folder_go_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(tmp_path)
    command = ["tokenize", "--tokenizer", "bytes", "--val-percent", "20", "--workers", "1"]
    assert prepare_data.main([*command, source.name, "--out", "out"]) == 0
    before = content(out)
    monkeypatch.chdir(out)
    assert prepare_data.main([*command, f"../{source.name}", "--out", "."]) == 0
    assert content(out) == before


def test_text_that_has_changed_is_said_in_words(source, tmp_path):
    tokenize(job(source, "bytes", val_percent=20.0), tmp_path, 1)
    (source / "more.txt").write_text("more")
    with pytest.raises(UsageError, match="other text: sources, or their sizes or times, have"):
        tokenize(job(source, "bytes", val_percent=20.0), tmp_path, 1)


def test_the_last_line_is_a_command_that_trains_with_the_tokenizers_vocabulary(
    source, tmp_path, capsys
):
    out = tmp_path / "my shards"
    command = ["tokenize", str(source), "--out", str(out), "--tokenizer", "train:300"]
    assert prepare_data.main([*command, "--val-percent", "20", "--workers", "1"]) == 0
    last = shlex.split(capsys.readouterr().out.splitlines()[-1].rpartition(": ")[2])
    assert last == ["python", "train.py", "data=bins", f"data.dir={out}"]


@pytest.mark.parametrize(("out", "said"), [("src/x", "lies in"), (".", "holds a source")])
def test_shards_are_not_written_among_the_sources(source, tmp_path, capsys, out, said):
    before = content(tmp_path)
    command = ["tokenize", str(source), "--tokenizer", "bytes", "--out", str(tmp_path / out)]
    assert prepare_data.main(command) == 2
    assert said in capsys.readouterr().err
    assert content(tmp_path) == before and not (source / "x").exists()


def test_a_tokenizer_that_loses_bytes_trains_and_is_told(source, tmp_path, capsys):
    content = json.loads(train_on(iter(TEXTS), 300, ["<|endoftext|>"]).serialise())
    content["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    command = ["tokenize", str(source), "--tokenizer", str(tmp_path), "--out", str(out)]
    assert prepare_data.main([*command, "--val-percent", "20", "--workers", "1"]) == 0
    assert capsys.readouterr().out.count("does not give back exact bytes") == 1
    corpus = make_corpus(DataConfig(source=Source.bins, dir=str(out), vocab_size=0), 0)
    assert corpus.codec.token_bytes() is None and val_bytes(corpus, 16, 2) == 0
    assert "exact bytes" in corpus.facts["no nats/byte"]
