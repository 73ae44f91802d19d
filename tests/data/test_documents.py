import gzip
import json
import pickle
import sys
from collections import Counter

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from geon.data import documents as reader
from geon.data.documents import documents, parts
from geon.data.folders import files_below
from geon.errors import UsageError

TEXTS = ["one\nline ÿ", "", "狐 🦊", "x" * 300, "\u0000\u2028\\u00e9"]


def lines(texts, field="text"):
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def read(*sources, **options):
    return [d.text for d in documents([str(s) for s in sources], **options)]


def refused(*sources, **options):
    with pytest.raises(UsageError) as caught:
        read(*sources, **options)
    return str(caught.value)


def zstd(raw):
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


@pytest.mark.parametrize("pack", [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines_and_text_are_read_packed_or_not(tmp_path, pack):
    suffix, packed = pack
    made = write(tmp_path / f"a.jsonl{suffix}", packed(b"\xef\xbb\xbf" + lines(TEXTS) + b"\r\n\n"))
    assert read(made) == TEXTS
    text = "ÿ fine\r\n\u0000 text"
    assert read(write(tmp_path / f"a.txt{suffix}", packed(text.encode()))) == [text]


def test_json_lines_are_known_by_their_first_line(tmp_path):
    """C4's files end in .json.gz; a settings file of one object is text."""
    packed = write(tmp_path / "c4.json.gz", gzip.compress(lines(TEXTS)))
    assert read(packed) == TEXTS == read(write(tmp_path / "plain.json", lines(TEXTS)))
    for other in (b'{"a": 1}', b'{\n "text": "a"\n}', b'["text"]', b'{"text": 1}'):
        assert read(write(tmp_path / "other.json", other)) == [other.decode()]


def test_frames_behind_each_other_are_one_file(tmp_path):
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstd)):
        raw = lines(TEXTS)
        made = write(tmp_path / f"a.jsonl{suffix}", pack(raw[:70]) + pack(raw[70:]))
        assert read(made) == TEXTS


def test_parquet_and_saved_datasets_are_read(tmp_path):
    table = pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(tmp_path / "saved")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": TEXTS})})
    both.save_to_disk(tmp_path / "dict")
    for name in ("a.parquet", "saved", "dict"):
        assert read(tmp_path / name, field="body") == TEXTS
    assert "'text'" in refused(tmp_path / "a.parquet")
    assert "id, body" in refused(tmp_path / "a.parquet")
    assert "int64" in refused(tmp_path / "a.parquet", field="id")
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "b.parquet")
    assert "row 1 has no text" in refused(tmp_path / "b.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    assert "cut" in refused(write(tmp_path / "c.parquet", whole[:-9]))
    raw = pyarrow.table({"text": pyarrow.array([b"ok", b"\xff", b"end"])})
    parquet.write_table(raw, tmp_path / "d.parquet")
    assert "row 1 is not UTF-8: byte 0" in refused(tmp_path / "d.parquet")
    counts = Counter()
    assert read(tmp_path / "d.parquet", skip_undecodable=True, counts=counts) == ["ok", "end"]
    assert counts == {"undecodable": 1}


def test_parts_of_large_files_hold_each_document_once(tmp_path, monkeypatch):
    texts = [f"document {i} " + "é" * (i % 50) for i in range(300)]
    rows = write(tmp_path / "a.jsonl", lines(texts))
    plain = write(tmp_path / "a.txt", "\n".join(texts).encode())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7)
    table = str(tmp_path / "a.parquet")
    for size in (1, 100, 999, 10**6):
        monkeypatch.setattr(reader, "PART", size)
        monkeypatch.setattr(reader, "PIECE", 128)
        monkeypatch.setattr(reader.columns, "_GROUPS", 4 * size)
        for source in (rows, table):
            found = [pickle.loads(pickle.dumps(p)) for p in parts([source])]
            assert [d.text for p in found for d in p.documents()] == texts
        assert (len(parts([rows])) > 20) == (size < 1000)
        pieces = list(documents([plain]))
        assert "".join(p.text for p in pieces) == "\n".join(texts)
        assert [p.follows for p in pieces] == [False] + [True] * (len(pieces) - 1)
        assert len(pieces) > 50


def test_long_texts_without_a_line_end_are_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 100)
    text = "狐🦊" * 500
    pieces = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(pieces) == text
    assert max(len(p.encode()) for p in pieces) <= 100


def test_bad_bytes_are_refused_or_counted(tmp_path):
    write(tmp_path / "f/bad.txt", b"abc\xff")
    write(tmp_path / "f/good.txt", b"good")
    write(
        tmp_path / "f/x.jsonl",
        lines(["a"]) + b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "b"}',
    )
    said = refused(tmp_path / "f")
    assert all(s in said for s in ("bad.txt", "byte 3", "0xff", "data.skip_undecodable"))
    assert "line 2 is not UTF-8: byte 10" in refused(tmp_path / "f/x.jsonl")
    counts = Counter()
    found = read(tmp_path / "f", skip_undecodable=True, counts=counts)
    assert found == ["good", "a", "b"]
    assert counts == {"undecodable": 3}


def test_the_line_of_an_error_is_right_in_a_later_part(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PART", 50)
    made = write(tmp_path / "a.jsonl", lines(["a" * 20] * 40) + b"{\n")
    assert "'" + made + "', line 41 is no JSON" in refused(made)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2 is no JSON"),
        (b"[" * 10**5, "line 2 is no JSON"),
        (b'"text"', "line 2 has no field 'text' (it is a text)"),
        (b'{"body": "x", "n": 1}', "no field 'text' (it is an object with body, n): name"),
        (b'{"text": null}', "line 2: field 'text' is null, and a text is expected"),
        (b'{"text": ["x"]}', "field 'text' is a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    assert said in refused(write(tmp_path / "a.jsonl", lines(["a"]) + line + b"\n"))


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_cut_or_damaged_packed_files_are_refused(tmp_path, suffix, pack):
    raw = pack(lines([str(i) * 50 for i in range(500)]))
    for end in (0, 3, 12, len(raw) // 2, len(raw) - 1):
        said = refused(write(tmp_path / f"a.jsonl{suffix}", raw[:end]))
        assert "it is cut" in said or "or damaged" in said
        assert f"a.jsonl{suffix}" in said
    broken = raw[:60] + bytes([raw[60] ^ 255]) + raw[61:]
    assert f"a.jsonl{suffix}" in refused(write(tmp_path / f"a.jsonl{suffix}", broken))
    assert "or damaged" in refused(write(tmp_path / f"b.txt{suffix}", b"plain text"))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for name, raw, package in (
        ("a.txt.zst", zstd(b"x"), "zstandard"),
        ("a.parquet", b"", "pyarrow"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        said = refused(write(tmp_path / name, raw))
        assert f"'{package}' package: pip install 'geon[data]'" in said


def test_folders_follow_links_and_read_nothing_twice(tmp_path):
    for name in ("a/1.txt", "a/sub/2.txt", "out/3.txt", "out/deep/4.txt", "a/.git/5", "a/.6"):
        write(tmp_path / name, name.encode())
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/0up").symlink_to(tmp_path / "a/sub")
    (tmp_path / "a/linked").symlink_to(tmp_path / "out")
    (tmp_path / "a/0file").symlink_to(tmp_path / "a/1.txt")
    (tmp_path / "a/again").symlink_to(tmp_path / "out/3.txt")
    found = files_below(tmp_path / "a")
    assert len(found) == 4
    assert {f.resolve().name for f in found} == {"1.txt", "2.txt", "3.txt", "4.txt"}
    assert found == sorted(found)
    assert tmp_path / "a/1.txt" in found and tmp_path / "a/sub/2.txt" in found
    assert "read twice" in refused(tmp_path / "a", tmp_path / "out/3.txt")
    (tmp_path / "a/dead").symlink_to(tmp_path / "nowhere")
    assert "link to nothing" in refused(tmp_path / "a")


def test_what_is_not_there_is_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere.txt")
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no files" in refused(tmp_path / "empty")
