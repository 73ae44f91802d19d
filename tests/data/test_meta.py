import json

import pytest

from geon.data.meta import Meta, ShardFile, SplitMeta, TokenizerMeta, read_meta, write_meta
from geon.errors import UsageError

GOOD = {
    "format": 1,
    "dtype": "uint16",
    "vocab_size": 256,
    "eot": 0,
    "source": "notes.txt",
    "tokenizer": {"name": "bytes", "fingerprint": "ab", "file": None},
    "splits": {
        "train": {
            "tokens": 7,
            "documents": 2,
            "bytes": 5,
            "shards": [
                {"file": "a_train_000001.bin", "tokens": 4, "sha256": "00"},
                {"file": "a_train_000002.bin", "tokens": 3, "sha256": "11"},
            ],
        },
        "val": {
            "tokens": 2,
            "documents": None,
            "bytes": None,
            "shards": [{"file": "a_val_000000.bin", "tokens": 2, "sha256": ""}],
        },
    },
}
MADE = Meta(
    dtype="uint16",
    vocab_size=256,
    eot=0,
    source="notes.txt",
    tokenizer=TokenizerMeta("bytes", "ab"),
    splits={
        "train": SplitMeta(
            (ShardFile("a_train_000001.bin", 4, "00"), ShardFile("a_train_000002.bin", 3, "11")),
            documents=2,
            bytes=5,
        ),
        "val": SplitMeta((ShardFile("a_val_000000.bin", 2),)),
    },
)


def test_what_is_written_is_the_agreed_json_and_is_read_again(tmp_path):
    path = write_meta(tmp_path, MADE)
    assert json.loads(path.read_text()) == GOOD
    assert read_meta(tmp_path) == MADE
    assert [one.name for one in tmp_path.iterdir()] == ["meta.json"]


def changed(dotted, value):
    content = json.loads(json.dumps(GOOD))
    node = content
    *outer, last = dotted.split("/")
    for key in outer:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None and last != "file":
        del node[last]
    else:
        node[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "expected an object"),
        (changed("format", 2), "format 2, expected 1"),
        (changed("format", None), "format is null"),
        (changed("dtype", "float32"), 'dtype is "float32", expected uint16 or uint32'),
        (changed("vocab_size", 0), "vocab_size is 0"),
        (changed("vocab_size", True), "vocab_size is true"),
        (changed("eot", 256), "eot is 256"),
        (changed("source", None), "source is null"),
        (changed("splits", []), "splits is"),
        (changed("splits/train/tokens", 8), "splits.train.tokens is 8, expected 7"),
        (changed("splits/train/shards/1/tokens", -1), "shards[1].tokens is -1"),
        (changed("splits/train/shards/1/file", "../x.bin"), "shards[1].file"),
        (changed("splits/val/shards/0/file", "a_train_000001.bin"), "each file once"),
        (changed("tokenizer/file", "/etc/passwd"), "tokenizer.file"),
        (changed("tokenizer/name", None), "tokenizer.name"),
        (changed("splits/val/bytes", 1.5), "splits.val.bytes is 1.5"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(tmp_path, content, said):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        read_meta(tmp_path)
    assert said in str(caught.value) and "meta.json" in str(caught.value)


def test_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"meta\.json' cannot be read"):
        read_meta(tmp_path)
