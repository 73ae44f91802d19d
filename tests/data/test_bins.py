import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.data import Split, open_bins, write_bin
from geon.errors import UsageError

VOCAB = 1000


def shard_bytes(ids, magic=20240520, version=1, count=None):
    """The published format, written without the code under test."""
    header = [magic, version, len(ids) if count is None else count] + [0] * 253
    return struct.pack("<256i", *header) + struct.pack(f"<{len(ids)}H", *ids)


def open_one(path, vocab=VOCAB):
    with tempfile.NamedTemporaryFile() as other:
        other.write(shard_bytes([0, 0]))
        other.flush()
        return open_bins(str(path), other.name, vocab).train


@given(ids=st.lists(st.integers(0, 65_535), max_size=300))
@settings(deadline=None)
def test_what_is_written_is_the_published_format(ids):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        write_bin(path, np.array(ids, dtype=np.int64))
        assert path.read_bytes() == shard_bytes(ids)


@given(ids=st.lists(st.integers(0, 65_535), min_size=1, max_size=300), big=st.booleans())
@settings(deadline=None)
def test_what_is_written_is_read(ids, big):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        write_bin(path, np.array(ids, dtype=">u4" if big else np.uint16))
        split = open_one(path, 65_536)
        assert len(split) == len(ids)
        assert split.window(0, len(ids)).tolist() == ids


@pytest.mark.parametrize("ids", [[5, 65_536], [70_000], [-1]])
def test_ids_that_16_bits_do_not_hold_are_not_written(tmp_path, ids):
    with pytest.raises((UsageError, ValueError, OverflowError)):
        write_bin(tmp_path / "a.bin", np.array(ids))


def test_published_shards_are_read_in_the_order_of_their_names(tmp_path):
    for i in (5, 11, 0, 7, 3, 9, 1, 10, 4, 8, 2, 6):
        (tmp_path / f"train_{i:06}.bin").write_bytes(shard_bytes([2 * i, 2 * i + 1]))
    (tmp_path / "val_000000.bin").write_bytes(shard_bytes([7, 8, 9]))
    corpus = open_bins(f"{tmp_path}/train_*.bin", f"{tmp_path}/val_*.bin", VOCAB)
    assert corpus.train.window(0, 24).tolist() == list(range(24))
    assert corpus.val.window(0, 3).tolist() == [7, 8, 9]
    assert corpus.vocab_size == VOCAB
    assert corpus.codec is None
    assert (corpus.facts["train_tokens"], corpus.facts["val_tokens"]) == (24, 3)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6), data=st.data())
@settings(deadline=None, max_examples=200)
def test_windows_across_segments_are_slices_of_the_whole(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint16)
    split = Split("pieces", np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(split) == len(whole)
    if len(whole):
        start = data.draw(st.integers(0, len(whole) - 1))
        length = data.draw(st.integers(1, len(whole) - start))
        assert np.array_equal(split.window(start, length), whole[start : start + length])


def test_windows_across_shards_on_disk_are_slices_of_the_whole(tmp_path):
    ids = np.random.default_rng(0).integers(0, VOCAB, 100)
    for i, piece in enumerate(np.split(ids, [1, 40, 40, 97])):
        write_bin(tmp_path / f"{i}.bin", piece)
    split = open_one(tmp_path / "*.bin")
    for start in range(100):
        for length in (1, 2, 60, 100):
            if start + length <= 100:
                assert np.array_equal(split.window(start, length), ids[start : start + length])


GOOD = shard_bytes([1, 2, 3])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (shard_bytes([1], magic=7), ["starts with 7", "20240520"]),
        (struct.pack(">256i", 20240520, 1, *[0] * 254), ["magic 20240520"]),
        (shard_bytes([1], version=3), ["version 3", "expected 1"]),
        (shard_bytes([1], version=2), ["1 tokens", "1028 bytes", "has 1026"]),
        (GOOD[:-1], ["3 tokens", "1030 bytes", "has 1029"]),
        (GOOD[:1024], ["3 tokens", "1030 bytes", "has 1024"]),
        (GOOD + b"\0", ["3 tokens", "1030 bytes", "has 1031"]),
        (shard_bytes([1, 2], count=-1), ["-1 tokens"]),
        (GOOD[:1023], ["1023 bytes", "1024 of header"]),
        (b"", ["empty", "0 bytes"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_shards_are_refused_by_file_and_key(tmp_path, content, said, split):
    (tmp_path / "bad.bin").write_bytes(content)
    (tmp_path / "good.bin").write_bytes(GOOD)
    (tmp_path / "other").write_bytes(GOOD)
    globs = {"train": f"{tmp_path}/other", "val": f"{tmp_path}/other"}
    globs[split] = f"{tmp_path}/*.bin"
    with pytest.raises(UsageError) as caught:
        open_bins(**globs, vocab_size=VOCAB)
    missing = [s for s in [*said, "bad.bin", f"data.{split}"] if s not in str(caught.value)]
    assert not missing, str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("pattern", ["", "{folder}/none_*.bin"])
def test_a_glob_without_files_is_refused(tmp_path, split, pattern):
    (tmp_path / "good.bin").write_bytes(GOOD)
    pattern = pattern.format(folder=tmp_path)
    globs = {"train": f"{tmp_path}/*.bin", "val": f"{tmp_path}/*.bin"} | {split: pattern}
    with pytest.raises(UsageError) as caught:
        open_bins(**globs, vocab_size=VOCAB)
    assert f"data.{split} '{pattern}'" in str(caught.value)


def test_a_folder_that_a_glob_matches_is_refused(tmp_path):
    (tmp_path / "sub.bin").mkdir()
    with pytest.raises(UsageError, match=r"sub\.bin.*data\.train"):
        open_one(tmp_path / "*.bin")


@pytest.mark.parametrize(("top", "position"), [(10, 2), (11, 0), (65_535, 4)])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(tmp_path, top, position):
    ids = [1, 2, 3, 4, 9]
    ids[position] = top
    (tmp_path / "a.bin").write_bytes(shard_bytes(ids))
    with pytest.raises(UsageError) as caught:
        open_one(tmp_path / "a.bin", vocab=10)
    said = ["a.bin", f"token id {top}", f"position {position}", "data.vocab_size 10"]
    assert not [s for s in said if s not in str(caught.value)], str(caught.value)
    assert open_one(tmp_path / "a.bin", vocab=top + 1).window(0, 5).tolist() == ids


def test_ids_are_checked_in_every_piece_of_a_large_shard(tmp_path):
    ids = np.zeros((1 << 24) + 5, dtype=np.uint16)
    ids[-2] = 500
    write_bin(tmp_path / "a.bin", ids)
    with pytest.raises(UsageError, match=f"position {len(ids) - 2},"):
        open_one(tmp_path / "a.bin", vocab=500)


def test_an_empty_shard_is_no_error(tmp_path):
    (tmp_path / "0.bin").write_bytes(shard_bytes([]))
    (tmp_path / "1.bin").write_bytes(GOOD)
    assert open_one(tmp_path / "*.bin").window(0, 3).tolist() == [1, 2, 3]
