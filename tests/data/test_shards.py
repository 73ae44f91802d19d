"""Which files hold token ids, and what the others are answered with."""

import bz2
import gzip
import io
import json
import struct
import zipfile

import numpy as np
import pytest

from geon.data import open_bins, write_bin
from geon.data.foreign import kind
from geon.data.shards import open_bin
from geon.errors import UsageError

IDS = [3, 70_000, 0, 99_999, 2**16]
SMALL = [3, 700, 0, 999]


def npy(ids):
    stream = io.BytesIO()
    np.save(stream, ids)
    return stream.getvalue()


def read(path, vocab=100_000, dtype=""):
    shard = open_bin(path, vocab, "data.train", dtype)
    shard.check()
    return shard[0 : len(shard)].tolist()


def test_uint32_shards_are_version_2(tmp_path):
    path = tmp_path / "a.bin"
    write_bin(path, np.array(IDS), "uint32")
    by_hand = struct.pack("<256i", 20240520, 2, 5, *[0] * 253) + struct.pack("<5I", *IDS)
    assert path.read_bytes() == by_hand
    assert read(path) == IDS
    with pytest.raises(UsageError, match="do not fit the uint16"):
        write_bin(path, np.array(IDS))


@pytest.mark.parametrize(
    ("name", "content", "dtype", "ids"),
    [
        ("a.bin", np.array(SMALL, "<u2").tobytes(), "uint16", SMALL),
        ("a.bin", np.array(IDS, "<u4").tobytes(), "uint32", IDS),
        ("a.npy", npy(np.array(SMALL, "u2")), "", SMALL),
        ("a.npy", npy(np.array(SMALL, ">u2")), "", SMALL),
        ("a.npy", npy(np.array(IDS, "i8")), "", IDS),
        ("a.npy", npy(np.array(IDS, "i4")), "", IDS),
        ("a.npy", npy(np.array([3, 255, 0], "u1")), "", [3, 255, 0]),
        ("a.npy", npy(np.array(SMALL, "u2")), "uint16", SMALL),
    ],
)
def test_files_of_others_are_read(tmp_path, name, content, dtype, ids):
    path = tmp_path / name
    path.write_bytes(content)
    assert read(path, dtype=dtype) == ids


TEXT = "All happy families are alike; Alle glücklichen Familien gleichen einander.\n"
ROWS = "".join(json.dumps({"text": f"hello {i}"}) + "\n" for i in range(9))


def zipped():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return stream.getvalue()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 200001024\n"
TOKENIZE = "python -m geon.scripts.prepare_data tokenize"
WRONG = {
    "text.txt": (TEXT.encode(), ["is text", TOKENIZE, "data=text"]),
    "text.bin": (TEXT.encode(), ["is text", TOKENIZE]),
    "a.jsonl": (ROWS.encode(), ["is JSON lines", TOKENIZE]),
    "rows.bin": (ROWS.encode(), ["is JSON lines", TOKENIZE]),
    "a.csv": (b"text,label\nhello,1\nworld,0\n", ["is CSV"]),
    "a.jsonl.gz": (gzip.compress(ROWS.encode()), ["is gzip", TOKENIZE]),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"\x00" * 40, ["is zstd", TOKENIZE]),
    "a.parquet": (b"PAR1" + b"\x00" * 40, ["is parquet", TOKENIZE]),
    "data-00000-of-00001.arrow": (b"ARROW1\x00\x00" + b"\x00" * 40, ["Arrow", TOKENIZE]),
    "fineweb_train_000001.bin": (LFS.encode(), ["Git LFS pointer", "git lfs pull", "fineweb10b"]),
    "fineweb_val_000000.bin": (
        b"<!DOCTYPE html>\n<html><head><title>404</title>",
        ["is a web page", "fetch the file again"],
    ),
    "s3.bin": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', ["is a web page"]),
    "bare.bin": (np.array(SMALL, "<u2").tobytes(), ["data.dtype=uint16", "20240520"]),
    "meta.pkl": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}", ["no pickle is ever read"]),
    "weights.pt": (zipped(), ["is zip"]),
    "a.bz2": (bz2.compress(TEXT.encode()), ["is bzip2"]),
    "floats.npy": (npy(np.array([0.5, 1.5])), ["float64", "astype"]),
    "table.npy": (npy(np.zeros((2, 3), "u2")), ["shape (2, 3)", "ravel"]),
    "object.npy": (npy(np.array([1, None], dtype=object)), ["object"]),
    "cut.npy": (npy(np.zeros(9, "u2"))[:-3], ["9 tokens", "146 bytes", "has 143"]),
    "broken.npy": (b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u2', ", ["broken header"]),
    "train.idx": (b"MMIDIDX\x00\x00" + b"\x01" * 40, ["Megatron", "the .bin beside it"]),
    "empty.bin": (b"", ["empty, 0 bytes"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_answered_with_what_makes_it_right(tmp_path, name):
    content, said = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name)
    missing = [words for words in [*said, str(tmp_path / name)] if words not in str(caught.value)]
    assert not missing, str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in WRONG if n not in ("bare.bin", "meta.pkl")])
def test_a_dtype_does_not_make_ids_of_a_wrong_file(tmp_path, name):
    (tmp_path / name).write_bytes(WRONG[name][0])
    with pytest.raises(UsageError):
        read(tmp_path / name, dtype="uint16")


def test_ids_are_not_taken_for_text(tmp_path):
    """Of a byte tokenizer too, whose uint16 are text with zeros between."""
    rng = np.random.default_rng(0)
    for ids in (np.frombuffer(TEXT.encode(), np.uint8), rng.integers(0, 50257, 2000)):
        assert kind(tmp_path / "a.bin", ids.astype("<u2").tobytes()) == ""
        assert kind(tmp_path / "a.bin", ids.astype("<u4").tobytes()) == ""


@pytest.mark.parametrize(
    ("content", "dtype", "said"),
    [
        (b"\x01\x02\x03", "uint16", "no whole number of uint16"),
        (b"\x01\x02\x03\x04\x05\x06", "uint32", "no whole number of uint32"),
        (npy(np.array(SMALL, "i8")), "uint16", "holds int64 by its header, not the uint16"),
        (npy(np.array([4, -2, 1], "i4")), "", "token id -2 at position 1, below 0"),
        (npy(np.array([4, 2, 100_000], "i4")), "", "token id 100000 at position 2, at or above"),
    ],
)
def test_ids_of_another_size_or_sign_are_refused(tmp_path, content, dtype, said):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read(tmp_path / "a.npy", dtype=dtype)


def test_bare_ids_train_as_shards_do_and_have_a_fingerprint_of_their_dtype(tmp_path):
    ids = np.random.default_rng(0).integers(0, 200, 400)
    for name in ("train", "val"):
        (tmp_path / f"{name}.bin").write_bytes(ids.astype("<u2").tobytes())
    globs = f"{tmp_path}/train.bin", f"{tmp_path}/val.bin"
    corpus = open_bins(*globs, 500, dtype="uint16")
    assert corpus.train.window(3, 50).tolist() == ids[3:53].tolist()
    wide = open_bins(*globs, 2**24, dtype="uint32")
    assert wide.facts["sha256"] != corpus.facts["sha256"]
    assert len(wide.train) == 200
