"""The command that fetches FineWeb, against a hub on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from geon.data import open_bins
from geon.data.bpe import train_bpe
from geon.data.meta import read_meta
from geon.data.shards import header
from geon.launch import local
from geon.scripts import prepare_fineweb
from geon.scripts.prepare_data import main
from tests.data.hub import COMMIT, Hub, serving

pytestmark = pytest.mark.row("R35")
RNG = np.random.default_rng(0)


def shard(count=5_000, top=50_257):
    return header(count) + RNG.integers(0, top, count).astype("<u2").tobytes()


FILES = {f"fineweb_train_{i:06}.bin": shard() for i in range(1, 5)}
FILES |= {"fineweb_val_000000.bin": shard(), "README.json": b"{}"}
TRAIN = sorted(name for name in FILES if "train" in name)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "_AHEAD", prepare_fineweb.Patience(2, 0.01, 0.01))
    made = Hub(dict(FILES), prepare_fineweb.REPO)
    with serving(made) as made.address:
        yield made


def fetch(hub, folder, *more):
    return main(["fineweb10b", "--out", str(folder), "--endpoint", hub.address, *more])


def test_a_few_shards_are_fetched_described_and_train(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--shards", "2") == 0
    said = capsys.readouterr()
    assert "2 training and 1 validation shards, about 0.00 billion tokens, 0.00 GB" in said.out
    assert "10,000 training and 5,000 validation tokens, every file verified" in said.out
    assert f"data=bins data.dir={tmp_path}" in said.out
    assert "no tokenizer, so no nats/byte" in said.err  # this hub has none
    meta = read_meta(tmp_path)
    assert [one.file for one in meta.splits["train"].shards] == TRAIN[:2]
    assert (meta.vocab_size, meta.eot, meta.dtype) == (50257, 50256, "uint16")
    assert meta.source == f"{prepare_fineweb.REPO}@{COMMIT}"
    for split in meta.splits.values():
        for one in split.shards:
            assert re.fullmatch("[0-9a-f]{64}", one.sha256)
    corpus = open_bins("", "", 50304, str(tmp_path))
    ids = np.concatenate([np.frombuffer(FILES[name][1024:], "<u2") for name in TRAIN[:2]])
    assert np.array_equal(corpus.train.window(0, 10_000), ids)
    assert (tmp_path / f".{TRAIN[0]}.ids.json").is_file()  # looked at already


def test_more_shards_later_fetch_only_those(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--shards", "1") == 0
    hub.asked.clear()
    assert fetch(hub, tmp_path, "--shards", "3") == 0
    assert sorted(name for name, _ in hub.asked) == TRAIN[1:3]
    hub.asked.clear()
    assert fetch(hub, tmp_path, "--shards", "0") == 0
    assert [name for name, _ in hub.asked] == TRAIN[3:]
    assert fetch(hub, tmp_path, "--shards", "1") == 0  # what is there stays in use
    assert len(read_meta(tmp_path).splits["train"].shards) == 4


def test_a_torn_shard_is_fetched_again(hub, tmp_path, capsys):
    assert fetch(hub, tmp_path, "--shards", "1") == 0
    content = bytearray(FILES[TRAIN[0]])
    content[5000] ^= 1
    (tmp_path / TRAIN[0]).write_bytes(content)
    assert fetch(hub, tmp_path, "--shards", "1") == 0
    assert f"moved to '{tmp_path / TRAIN[0]}.wrong'" in capsys.readouterr().err
    assert (tmp_path / TRAIN[0]).read_bytes() == FILES[TRAIN[0]]


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        (["--shards", "5"], 2, "--shards 5: kjj0/fineweb10B-gpt2 has 4"),
        (["--pattern", "*.npy"], 2, "--pattern '*.npy' matches no training file"),
        (["--pattern", "*train*"], 2, "matches no validation file"),
        (["--repo", "nobody/nothing"], 1, "404"),
        (["--repo", "x"], 2, "OWNER/NAME"),
        (["--endpoint", "ftp://x"], 2, "--endpoint 'ftp://x' must be an address"),
    ],
)
def test_what_cannot_be_is_one_line_and_makes_nothing(hub, tmp_path, capsys, more, status, said):
    assert fetch(hub, tmp_path / "new", *more) == status
    error = capsys.readouterr().err
    assert said in error and error.startswith("geon: error: ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_broken_download_leaves_no_meta(hub, tmp_path, capsys):
    hub.digests[TRAIN[0]] = "00" * 32
    assert fetch(hub, tmp_path, "--shards", "1") == 1
    assert "checksum" in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()}
    assert not {"meta.json", TRAIN[0]} & left


@pytest.mark.parametrize("content", [b"\0" * 3000, header(9) + b"\0" * 17, b"words, words\n" * 99])
def test_what_is_no_shard_is_refused(hub, tmp_path, capsys, content):
    hub.files[TRAIN[0]] = content
    assert fetch(hub, tmp_path, "--shards", "1") == 2
    assert TRAIN[0] in capsys.readouterr().err
    assert not (tmp_path / TRAIN[0]).exists() and not (tmp_path / "meta.json").exists()


def test_shards_of_others_have_the_vocabulary_of_their_ids(tmp_path, capsys):
    files = {"x_train_0.bin": shard(100, 300), "y_val_0.bin": header(2) + b"\x2b\x01\x00\x00"}
    with serving(Hub(files, "me/mine")) as address:
        options = ["--out", str(tmp_path), "--endpoint", address, "--repo", "me/mine"]
        assert main(["fineweb10b", *options, "--shards", "0"]) == 0
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert (meta["vocab_size"], meta["eot"], meta["tokenizer"]) == (300, None, None)


def test_a_tokenizer_comes_beside_the_shards(tmp_path, capsys):
    text = "words and words, and other words\n" * 50
    codec = train_bpe(text, 270)
    ids = codec.encode(text).astype("<u2")
    shards = {f"{name}_0.bin": header(len(ids)) + ids.tobytes() for name in ("train", "val")}
    mine, made_by = Hub(shards, "me/mine"), Hub({}, "me/tokens", "models")
    made_by.files["tokenizer.json"] = codec.serialise().encode()
    with serving(mine, made_by) as address:
        options = ["fineweb10b", "--endpoint", address, "--repo", "me/mine", "--shards", "0"]
        options += ["--tokenizer", "me/tokens", "--out"]
        assert main([*options, str(tmp_path / "a")]) == 0
        meta = read_meta(tmp_path / "a")
        assert (meta.vocab_size, meta.tokenizer.file) == (codec.vocab_size, "tokenizer.json")
        corpus = open_bins("", "", 300, str(tmp_path / "a"))
        assert corpus.codec.decode(corpus.val.window(0, len(ids)).tolist()) == text.encode()
        mine.files["train_0.bin"] = shard(50, 400)
        assert main([*options, str(tmp_path / "b")]) == 2
        assert f"and the tokenizer has {codec.vocab_size} ids" in capsys.readouterr().err
    assert not (tmp_path / "b" / "meta.json").exists()


def test_ctrl_c_leaves_what_came_and_the_same_command_goes_on(tmp_path):
    big = {"a_train_1.bin": shard(20_000_000), "a_val_0.bin": shard()}
    hub = Hub(big, prepare_fineweb.REPO)
    hub.slow = 0.05
    with serving(hub) as address:
        command = [sys.executable, "-m", "geon.scripts.prepare_data", "fineweb10b", "--out"]
        command += [str(tmp_path), "--shards", "1", "--tokenizer", "none"]
        env = {**os.environ, "PYTHONPATH": str(local.ROOT), "HF_ENDPOINT": address}
        process = subprocess.Popen(
            command,
            env=env,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell's & ignores it
        )
        while not [p for p in tmp_path.glob("a_train*.part") if p.stat().st_size > 1 << 20]:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=20)[1]
        assert process.returncode == 130, error
        assert error.splitlines()[-1].startswith("geon: stopped; what was fetched is kept")
        assert "Traceback" not in error
        (part,) = tmp_path.glob("a_train*.part")
        size, hub.slow = part.stat().st_size, 0
        assert size < len(big["a_train_1.bin"])
        hub.asked.clear()
        assert subprocess.run(command, env=env, timeout=60, check=False).returncode == 0
        assert ("a_train_1.bin", f"bytes={size}-") in hub.asked
    assert (tmp_path / "a_train_1.bin").read_bytes() == big["a_train_1.bin"]
