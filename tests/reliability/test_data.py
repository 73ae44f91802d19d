"""Data that cannot be read, was cut or exchanged, or is read twice: named errors, no signal."""

import os
import subprocess
import sys

import numpy as np
import pytest

from geon.data import load_codec, open_bins, text_corpus, write_bin
from geon.data.bpe import train_bpe
from geon.engine import build
from geon.errors import UsageError
from geon.launch import local
from geon.launch.compose import compose
from tests.launch.jobs import SMALLEST

VOCAB = 64


@pytest.fixture
def shards(tmp_path):
    """Two shards to train on, one to validate on."""
    rng = np.random.default_rng(0)
    for name in ("train_0", "train_1", "val_0"):
        write_bin(tmp_path / f"{name}.bin", rng.integers(0, VOCAB, 3_000_000))
    return tmp_path


def opened(folder, train="train_*.bin", val="val_*.bin", vocab=VOCAB):
    return open_bins(f"{folder}/{train}", f"{folder}/{val}", vocab)


@pytest.mark.row("R26")
@pytest.mark.parametrize("size", [0, 1024, 1025, 1024 + 2 * 5_000_00, 1024 + 2 * 3_000_000 - 1])
def test_a_shard_that_is_cut_while_it_is_read_is_an_error_with_its_place(shards, size):
    """A map of the file would end the process with SIGBUS."""
    corpus, path = opened(shards), shards / "train_1.bin"
    whole = corpus.train.window(5_999_000, 1000)
    os.truncate(path, size)
    with pytest.raises(UsageError) as caught:
        corpus.train.window(5_999_000, 1000)
    said = [str(path), f"ends at byte {size}", f"before byte {1024 + 2 * 3_000_000}"]
    assert not [words for words in said if words not in str(caught.value)], str(caught.value)
    assert len(whole) == 1000


@pytest.mark.row("R26")
def test_an_id_that_appears_while_it_is_read_is_refused_with_its_place(shards):
    corpus = opened(shards)
    with (shards / "train_0.bin").open("r+b") as file:
        file.seek(1024 + 2 * 777)
        file.write(np.array([VOCAB], "<u2").tobytes())
    assert len(corpus.train.window(0, 777)) == 777
    with pytest.raises(UsageError, match=rf"train_0\.bin.*token id {VOCAB} at position 777,"):
        corpus.train.window(770, 10)


@pytest.mark.row("R26")
def test_a_disk_that_fails_is_an_error_with_file_and_place(shards, monkeypatch):
    corpus = opened(shards)

    def fail(file, size, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error, at byte 1044: '.*train_0\.bin'"):
        corpus.train.window(10, 10)


@pytest.mark.row("R26")
def test_a_run_whose_shard_is_cut_ends_in_one_line(shards):
    """The whole program, which cuts its own shard after two steps."""
    program = shards / "cut.py"
    program.write_text(
        "import os, sys, runpy\n"
        "from geon.engine.trainer import Trainer\n"
        "step = Trainer.train_step\n"
        "def cut(self):\n"
        "    step(self)\n"
        f"    self.step == 2 and os.truncate({str(shards / 'train_0.bin')!r}, 1024)\n"
        f"    self.step == 2 and os.truncate({str(shards / 'train_1.bin')!r}, 1024)\n"
        "Trainer.train_step = cut\n"
        f"sys.argv[0] = {str(local.ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    data = ["data=bins", f"data.train={shards}/train_*.bin", f"data.val={shards}/val_*.bin"]
    options = [*data, f"data.vocab_size={VOCAB}", "schedule.steps=9", f"output={shards}"]
    kept = [one for one in SMALLEST if one.split("=")[0] not in ("data", "data.tokens")]
    env = {**os.environ, "PYTHONPATH": str(local.ROOT)}
    command = [sys.executable, str(program), *kept, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("geon: error:")]
    assert ".bin' ends at byte 1024" in said
    assert "Traceback" not in done.stderr


@pytest.mark.row("R26")
@pytest.mark.parametrize("what", ["shard", "text", "folder"])
def test_what_may_not_be_read_is_one_message(shards, monkeypatch, what):
    """By a stand-in for the system, because rights do not bind who runs as root."""

    def refuse(path, *more, **words):
        raise PermissionError(13, "Permission denied", str(path))

    if what == "shard":
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(UsageError, match=r"train_0\.bin' cannot be read: Permission denied"):
            opened(shards)
        return
    (shards / "text").mkdir()
    (shards / "text" / "a.txt").write_text("words " * 100)
    if what == "folder":
        monkeypatch.setattr(os, "scandir", refuse)
        monkeypatch.setattr(os, "listdir", refuse)
    else:
        monkeypatch.setattr("io.open", refuse)
    with pytest.raises(UsageError, match=r"data\.path.*text.*' cannot be read: Permission"):
        text_corpus(str(shards / "text"), 10.0)


@pytest.mark.row("R26")
def test_a_file_is_read_once_under_any_name(shards):
    (shards / "val_1.bin").symlink_to(shards / "train_1.bin")
    with pytest.raises(
        UsageError, match=r"val_1\.bin' \(data\.val\) is the same file as '.*train_1"
    ):
        opened(shards)
    (shards / "val_1.bin").unlink()
    (shards / "train_2.bin").symlink_to(shards / "train_0.bin")
    with pytest.raises(UsageError, match=r"train_2\.bin' \(data\.train\) is the same file"):
        opened(shards)
    with pytest.raises(UsageError, match="is the same file"):
        opened(shards, "train_0.bin", "*0.bin")


@pytest.mark.row("R25")
@pytest.mark.parametrize("key", ["data.train=x", "data.val=x", "data.dtype=uint16"])
def test_a_folder_takes_no_globs_and_no_dtype(key):
    kept = [one for one in SMALLEST if one.split("=")[0] not in ("data", "data.tokens")]
    with pytest.raises(UsageError, match=f"{key} has no effect with .* without data.dir"):
        compose([*kept, "data=bins", "data.dir=x", key], "train")


@pytest.mark.row("R18")
def test_the_fingerprint_notices_another_shard_or_another_order(shards):
    first = opened(shards).facts["sha256"]
    assert opened(shards).facts["sha256"] == first
    one, two = shards / "train_0.bin", shards / "train_1.bin"
    content = one.read_bytes()

    def changed():
        return opened(shards).facts["sha256"] != first

    one.rename(shards / "aside")
    two.rename(one)
    (shards / "aside").rename(two)
    assert changed()  # two shards of one size have changed places
    one.write_bytes(content)
    for place in (1024, 1024 + 2**20 - 2000, len(content) // 9 + 100, len(content) - 1000):
        torn = bytearray(content)
        torn[place : place + 100] = b"\0" * 100
        one.write_bytes(torn)
        assert changed(), place
    two.write_bytes(content)
    one.write_bytes(content)
    assert changed()  # both are there, and both are the first
    moved = shards / "moved"
    moved.mkdir()
    write_bin(two, np.random.default_rng(1).integers(0, VOCAB, 3_000_000))
    again = opened(shards).facts["sha256"]
    for path in shards.glob("*.bin"):
        path.rename(moved / path.name)
    assert opened(moved).facts["sha256"] == again  # another folder is the same data


STORY = "".join(f"{i % 7} of {i % 5} ties, {i % 3} and {i % 2}.\n" for i in range(400))


def text_config(path, *options):
    kept = [one for one in SMALLEST if one.split("=")[0] not in ("data", "data.tokens")]
    return compose([*kept, "data=text", f"data.path={path}", *options]).data


def test_a_checkpoints_tokenizer_is_used_and_none_trained(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(STORY)
    (tmp_path / "b.txt").write_text("Quite other words, xyz! " * 200)
    a, b = (
        text_config(tmp_path / name, "data.bpe_vocab=300", "data.vocab_size=300")
        for name in ("a.txt", "b.txt")
    )
    saved = build.make_corpus(a, 0).codec.serialise()
    assert build.make_corpus(b, 0).codec.serialise() != saved
    monkeypatch.setattr("geon.data.bpe.train_bpe", None)  # training one would fail
    for config in (a, b):
        corpus = build.make_corpus(config, 0, codec=saved)
        assert corpus.codec.serialise() == saved
        ids = np.concatenate([one[:] for one in corpus.val.segments])
        assert load_codec(saved).decode(ids) == corpus.val_text


def test_a_checkpoints_tokenizer_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    saved = train_bpe(STORY, 300).serialise()
    size = load_codec(saved).vocab_size
    as_bytes = text_config(tmp_path / "a.txt", "data.bpe_vocab=0", "data.vocab_size=300")
    with pytest.raises(UsageError, match=f"data.bpe_vocab 0, .* set data.bpe_vocab={size}"):
        build.make_corpus(as_bytes, 0, codec=saved)
    as_bpe = text_config(tmp_path / "a.txt", "data.bpe_vocab=300", "data.vocab_size=300")
    with pytest.raises(UsageError, match=r"data.bpe_vocab 300, .* set data.bpe_vocab=0"):
        build.make_corpus(as_bpe, 0, codec="bytes")
    assert build.make_corpus(as_bytes, 0, codec="bytes").vocab_size == 256


def test_a_bpe_is_a_function_of_its_text(tmp_path):
    """Many pairs are as frequent as others here; threads and hash seeds may not choose."""
    first = train_bpe(STORY, 330).serialise()
    assert all(train_bpe(STORY, 330).serialise() == first for _ in range(5))
    (tmp_path / "story").write_text(STORY)
    program = (
        "import hashlib, sys; from pathlib import Path; from geon.data.bpe import train_bpe\n"
        "print(train_bpe(Path(sys.argv[1]).read_text(), 330).serialise(), end='')"
    )
    env = {**os.environ, "PYTHONPATH": str(local.ROOT), "RAYON_NUM_THREADS": "5"}
    command = [sys.executable, "-c", program, str(tmp_path / "story")]
    other = {**env, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=other)
    assert done.stdout == first, done.stderr
