"""The vocabulary is checked once a file, by one process of a machine."""

import fcntl
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from geon.data import stamps, write_bin
from geon.data.shards import Shard, open_bin
from geon.data.stamps import check_ids
from geon.errors import UsageError
from geon.launch import local


@pytest.fixture(autouse=True)
def homes(tmp_path, monkeypatch):
    """Caches and temporary files below the test's own folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def looks(monkeypatch):
    """Names of the files that were read whole."""
    found, top = [], Shard.top
    monkeypatch.setattr(Shard, "top", lambda shard: (found.append(shard.path.name), top(shard))[1])
    return found


def shard(path, vocab=50):
    return open_bin(path, vocab, "data.train")


def test_a_file_is_looked_at_once_and_again_when_it_changed(tmp_path, looks):
    path = tmp_path / "a.bin"
    write_bin(path, np.array([1, 49, 2]))
    for _ in range(3):
        check_ids([shard(path)], 50)
    assert looks == ["a.bin"]
    assert json.loads((tmp_path / ".a.bin.ids.json").read_text())["max"] == 49
    with pytest.raises(UsageError, match=r"a\.bin' holds token id 49 at position 1, .* 49"):
        check_ids([shard(path, 49)], 49)
    assert looks == ["a.bin"]
    write_bin(path, np.array([1, 60, 2]))
    with pytest.raises(UsageError, match="token id 60"):
        check_ids([shard(path)], 50)
    assert looks == ["a.bin"] * 2
    write_bin(path, np.array([1, 60, 2, 4]))
    os.utime(path, ns=(0, 0))
    check_ids([shard(path, 61)], 61)
    assert looks == ["a.bin"] * 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"max": 3}', '{"max": "x"}', "\x00"])
def test_a_broken_stamp_is_none(tmp_path, looks, content):
    write_bin(tmp_path / "a.bin", np.array([1, 60, 2]))
    (tmp_path / ".a.bin.ids.json").write_text(content)
    with pytest.raises(UsageError, match="token id 60"):
        check_ids([shard(tmp_path / "a.bin")], 50)
    assert looks == ["a.bin"]


def test_a_stamp_of_a_read_only_folder_lies_in_the_cache(tmp_path, looks, monkeypatch):
    """By a stand-in, because rights do not bind who runs as root."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_bin(folder / "a.bin", np.array([1, 49, 2]))
    write = type(folder).write_text

    def refuse(path, *content):
        if path.parent == folder:
            raise OSError(30, "Read-only file system")
        return write(path, *content)

    monkeypatch.setattr(type(folder), "write_text", refuse)
    for _ in range(2):
        check_ids([shard(folder / "a.bin")], 50)
    assert looks == ["a.bin"]
    assert [one.name for one in folder.iterdir()] == ["a.bin"]
    assert len(list((tmp_path / ".cache" / "geon" / "ids").iterdir())) == 1
    (tmp_path / ".cache").rename(tmp_path / "gone")
    (tmp_path / ".cache").write_text("no folder")  # no home either: temporary files take it
    for _ in range(2):
        check_ids([shard(folder / "a.bin")], 50)
    assert looks == ["a.bin"] * 2


def test_a_lock_that_is_held_for_ever_is_not_waited_for_for_ever(tmp_path, looks, monkeypatch):
    monkeypatch.setattr(stamps, "_PATIENCE", 0.3)
    write_bin(tmp_path / "a.bin", np.array([1, 60, 2]))
    folder = tmp_path / f"geon-{os.getuid()}"
    folder.mkdir(mode=0o700)
    with (folder / f"{stamps._key(tmp_path / 'a.bin')}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(UsageError, match="token id 60"):
            check_ids([shard(tmp_path / "a.bin")], 50)
    assert 0.3 <= time.monotonic() - begun < 5
    assert looks == ["a.bin"]


PROGRAM = """
import sys, time
from pathlib import Path
from geon.data.shards import Shard, open_bin
from geon.data.stamps import check_ids
top = Shard.top
def slow(shard):
    print(shard.path.name, flush=True)
    time.sleep(0.3)
    return top(shard)
Shard.top = slow
paths = sorted(Path(sys.argv[1]).glob("*.bin"))
check_ids([open_bin(path, 50, "data.train") for path in paths], 50)
"""


def test_processes_of_a_machine_share_the_files(tmp_path):
    names = [f"{i}.bin" for i in range(6)]
    for name in names:
        write_bin(tmp_path / name, np.arange(40))
    env = {**os.environ, "PYTHONPATH": str(local.ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) for _ in "ab"]
    said = [one.communicate(timeout=60)[0].split() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert sorted(said[0] + said[1]) == names
