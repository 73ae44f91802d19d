"""Text to shards: what is in them, whatever the processes, over kills and full disks."""

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer

from geon.data import open_bins, prepare, writer
from geon.data.bpe import train_on
from geon.data.documents import parts
from geon.data.prepare import Job, tokenize
from geon.errors import UsageError
from geon.scripts import prepare_data

EOT = "<|endoftext|>"
TEXTS = [f"document {i} of ties\n" + "naïve 狐 it's {i}\n" * (i % 17) for i in range(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two files of JSON lines, one packed, and a tokenizer."""
    home = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)]
    (home / "src").mkdir()
    (home / "src" / "a.jsonl").write_text("".join(lines[:150]))
    with gzip.open(home / "src" / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(lines[150:]))
    codec = train_on(iter(TEXTS), 400, [EOT])
    (home / "tokenizer.json").write_text(codec.serialise())
    return home


def job(home, **changes):
    fields = {
        "parts": parts([str(home / "src")]),
        "source": "src",
        "tokenizer": str(home / "tokenizer.json"),
        "val_percent": 10.0,
        "shard_tokens": 2000,
    }
    return Job(**(fields | changes))


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".bin"}


def ids_of(folder, meta, split):
    files = [folder / one.file for one in meta.splits[split].shards]
    for file, one in zip(files, meta.splits[split].shards, strict=True):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == one.sha256
    return np.concatenate([np.fromfile(file, "<u2", offset=1024) for file in files])


@pytest.fixture(scope="module")
def whole(home):
    """The shards of a run that nothing disturbed."""
    folder = home / "whole"
    folder.mkdir()
    return folder, tokenize(job(home), folder, 1)


def test_ids_are_those_of_the_tokenizers_package_by_the_hash_of_the_text(home, whole):
    folder, done = whole
    other = Tokenizer.from_file(str(home / "tokenizer.json"))
    wanted = {"train": [], "val": []}
    documents = {"train": 0, "val": 0}
    for text in TEXTS:
        first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        split = "val" if first % 10_000 < 1000 else "train"
        wanted[split] += [other.token_to_id(EOT), *other.encode(text).ids]
        documents[split] += 1
    for split, ids in wanted.items():
        assert ids_of(folder, done.meta, split).tolist() == ids
        assert done.meta.splits[split].documents == documents[split]
    assert sum(s.bytes for s in done.meta.splits.values()) == sum(len(t.encode()) for t in TEXTS)
    sizes = [one.tokens for one in done.meta.splits["train"].shards]
    assert len(sizes) > 3 and set(sizes[:-1]) == {2000}
    assert not [p for p in folder.iterdir() if p.suffix == ".part"]
    corpus = open_bins("", "", 400, str(folder))
    assert corpus.val.window(0, len(wanted["val"])).tolist() == wanted["val"]
    assert corpus.codec is not None


def test_processes_change_nothing(home, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH", 500)
    tokenize(job(home), tmp_path, 2)
    assert content(tmp_path) == content(whole[0])


@pytest.mark.parametrize("after", [1, 4, 9, 23])
@pytest.mark.parametrize("noted", [True, False])
def test_a_run_that_ends_anywhere_goes_on_to_the_same_shards(
    home, whole, tmp_path, monkeypatch, after, noted
):
    """noted: the journal is written at each batch, or at the first alone, so that it lags."""
    monkeypatch.setattr(prepare, "BATCH", 500)
    count = 0
    monkeypatch.setattr(prepare, "_EVERY", -1.0)

    def stop(read):
        nonlocal count
        count += 1
        if not noted:
            monkeypatch.setattr(prepare, "_EVERY", 1e9)
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(job(home), tmp_path, 1, told=stop)
    for path in tmp_path.glob("*.bin"):
        assert content(whole[0])[path.name] == path.read_bytes()
    assert not (tmp_path / "meta.json").exists()
    done = tokenize(job(home), tmp_path, 1)
    assert content(tmp_path) == content(whole[0])
    assert done.meta.splits == whole[1].meta.splits
    again = tokenize(job(home), tmp_path, 1)
    assert again.already and again.meta == done.meta


@pytest.mark.slow
def test_kills_change_nothing(home, whole, tmp_path):
    command = [sys.executable, "-m", "geon.scripts.prepare_data", "tokenize", str(home / "src")]
    command += ["--out", str(tmp_path), "--tokenizer", str(home / "tokenizer.json")]
    command += ["--val-percent", "10", "--shard-tokens", "2000", "--workers", "2"]
    for wait in (1.0, 4.0, 8.0):
        process = subprocess.Popen(command)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, timeout=120)
    assert content(tmp_path) == content(whole[0])


def test_ctrl_c_reaches_the_group_and_is_one_line(home, tmp_path):
    """While processes still import: the terminal sends it to all of them."""
    command = [sys.executable, "-m", "geon.scripts.prepare_data", "tokenize", str(home / "src")]
    command += ["--out", str(tmp_path), "--tokenizer", "bytes", "--workers", "2"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / writer.JOURNAL).exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    said = job.communicate(timeout=60)[1]
    assert "Traceback" not in said and "geon: stopped; what is done is kept" in said


def test_a_full_disk_is_one_message_and_goes_on(home, whole, tmp_path, monkeypatch, capsys):
    real = writer.SplitWriter.add

    def full(self, ids):
        if len(self.shards) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
        real(self, ids)

    command = ["tokenize", str(home / "src"), "--out", str(tmp_path), "--workers", "1"]
    command += ["--tokenizer", str(home / "tokenizer.json"), "--val-percent", "10"]
    command += ["--shard-tokens", "2000"]
    monkeypatch.setattr(prepare, "BATCH", 500)
    with monkeypatch.context() as patch:
        patch.setattr(writer.SplitWriter, "add", full)
        assert prepare_data.main(command) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "make room, and run the same command again" in told
    assert prepare_data.main(command) == 0
    assert content(tmp_path) == content(whole[0])
    assert "MB/s a core" in capsys.readouterr().out


def test_equal_documents_never_straddle_the_splits(home, tmp_path):
    (tmp_path / "src").mkdir()
    for name in "ab":
        lines = [json.dumps({"text": f"<{i}>"}) + "\n" for i in range(300)]
        (tmp_path / "src" / f"{name}.jsonl").write_text("".join(lines))
    made = job(home, parts=parts([str(tmp_path / "src")]), tokenizer="bytes", val_percent=20.0)
    done = tokenize(made, tmp_path, 1)
    splits = {
        name: bytes(ids_of(tmp_path, done.meta, name).astype(np.uint8)).split(b"\0")[1:]
        for name in ("train", "val")
    }
    assert not set(splits["train"]) & set(splits["val"])
    assert len(splits["train"]) + len(splits["val"]) == 600
    assert 60 < len(splits["val"]) < 180
    assert done.meta.tokenizer.file is None


def test_one_text_file_trains_and_validates(home, tmp_path):
    text = "".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    made = job(home, parts=parts([str(tmp_path / "a.txt")]), val_percent=5.0)
    done = tokenize(made, tmp_path, 1)
    sizes = {name: split.bytes for name, split in done.meta.splits.items()}
    assert sum(sizes.values()) == len(text.encode())
    assert 0.03 < sizes["val"] / len(text.encode()) < 0.07


def test_a_tokenizer_is_trained_once_on_training_text(home, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    done = tokenize(job(home, tokenizer="train:300"), tmp_path, 1)
    assert (done.meta.vocab_size, done.meta.eot) == (300, 0)
    (tmp_path / "meta.json").unlink()
    journal = json.loads((tmp_path / writer.JOURNAL).read_text())
    (tmp_path / writer.JOURNAL).write_text(json.dumps(journal | {"done": False}))
    monkeypatch.setattr(prepare, "_learn", refuse)
    assert tokenize(job(home, tokenizer="train:300"), tmp_path, 1).meta == done.meta


def test_another_command_in_the_same_folder_is_refused(home, tmp_path):
    tokenize(job(home), tmp_path, 1)
    with pytest.raises(UsageError, match=r"shard_tokens was 2000 and is 3000.*--resume never"):
        tokenize(job(home, shard_tokens=3000), tmp_path, 1)
    done = tokenize(job(home, shard_tokens=3000), tmp_path, 1, resume=False)
    names = {one.file for split in done.meta.splits.values() for one in split.shards}
    assert names == set(content(tmp_path))
    (tmp_path / writer.JOURNAL).unlink()
    with pytest.raises(UsageError, match=r"holds a meta\.json of something else"):
        tokenize(job(home), tmp_path, 1)


def test_a_dtype_that_is_too_small_and_a_larger_one(home, tmp_path):
    done = tokenize(job(home, dtype="uint32"), tmp_path, 1)
    assert done.meta.dtype == "uint32"
    corpus = open_bins("", "", 400, str(tmp_path))
    assert len(corpus.train) == done.meta.splits["train"].tokens


def test_what_is_gone_is_said(home, tmp_path):
    tokenize(job(home), tmp_path, 1)
    (tmp_path / "tokens_train_000002.bin").unlink()
    with pytest.raises(UsageError, match=r"000002.bin' is gone or cut.*--resume never"):
        tokenize(job(home), tmp_path, 1)
