"""Shards of a folder with a meta.json, and the tokenizer beside them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from geon.data import open_bins, write_bin
from geon.data.bpe import train_bpe
from geon.data.meta import Meta, ShardFile, SplitMeta, TokenizerMeta, read_meta, write_meta
from geon.data.tokenizers import open_codec
from geon.engine.evaluate import val_bytes, val_text
from geon.errors import UsageError

STORY = "".join(f"{i % 7} of {i % 5} ties, naïve {i % 3} and {i % 2}.\n" for i in range(500))


def made(folder, kind="bytes", dtype="uint16"):
    """A folder as the writer of shards leaves it: two files of training, one of validation."""
    folder.mkdir(exist_ok=True)
    if kind == "bytes":
        codec, file = open_codec("bytes"), None
    else:
        file = "tokenizer.json"
        (folder / file).write_text(train_bpe(STORY, 300).serialise())
        codec = open_codec(str(folder / file))
    ids = codec.encode(STORY).astype(np.int64)
    cuts = np.split(ids, [1000, 3000])
    names = "s_val_000000.bin", "s_train_000001.bin", "s_train_000002.bin"
    for name, piece in zip(names, cuts, strict=True):
        write_bin(folder / name, piece, dtype)
    files = [ShardFile(name, len(piece)) for name, piece in zip(names, cuts, strict=True)]
    splits = {"train": SplitMeta(tuple(files[1:])), "val": SplitMeta(tuple(files[:1]))}
    tokenizer = TokenizerMeta(kind, codec.fingerprint, file)
    meta = Meta(dtype, codec.vocab_size, codec.eot, "a story", tokenizer, splits)
    write_meta(folder, meta)
    return meta, codec, ids


def opened(folder, vocab=300):
    return open_bins("", "", vocab, str(folder))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_folder_is_read_with_its_text(tmp_path, kind, dtype):
    meta, codec, ids = made(tmp_path, kind, dtype)
    corpus = opened(tmp_path)
    assert corpus.train.window(0, len(ids) - 1000).tolist() == ids[1000:].tolist()
    assert corpus.val.window(0, 1000).tolist() == ids[:1000].tolist()
    assert corpus.vocab_size == codec.vocab_size == meta.vocab_size
    text = codec.decode(ids[1 : 1 + 3 * 64].tolist())
    assert text in STORY.encode() and len(text) > 100
    assert val_text(corpus, 64, 3) == text
    assert val_bytes(corpus, 64, 3) == len(text)
    assert "no text" not in corpus.facts


def test_the_globs_of_a_folder_are_the_same_data_and_text(tmp_path):
    made(tmp_path, "bpe")
    by_folder = opened(tmp_path)
    by_globs = open_bins(f"{tmp_path}/*_train_*.bin", f"{tmp_path}/*_val_*.bin", 300)
    assert by_globs.facts["sha256"] == by_folder.facts["sha256"]
    assert by_globs.codec.serialise() == by_folder.codec.serialise()
    write_bin(tmp_path / "s_train_000003.bin", np.arange(20))
    more = open_bins(f"{tmp_path}/*_train_*.bin", f"{tmp_path}/*_val_*.bin", 300)
    assert more.codec is None and "s_train_000003" in more.facts["no text"]


def test_ids_that_no_tokenizer_made_have_no_text(tmp_path):
    meta, _, _ = made(tmp_path)
    write_meta(tmp_path, replace(meta, tokenizer=None))
    corpus = opened(tmp_path)
    assert corpus.codec is None and "names no tokenizer" in corpus.facts["no text"]
    assert val_text(corpus, 64, 3) == b"" and val_bytes(corpus, 64, 3) == 0


def test_a_tokenizer_that_is_gone_costs_the_text_only(tmp_path):
    made(tmp_path, "bpe")
    (tmp_path / "tokenizer.json").unlink()
    corpus = opened(tmp_path)
    assert corpus.codec is None and "tokenizer" in corpus.facts["no text"]


def test_another_tokenizer_than_the_one_that_made_the_shards_is_refused(tmp_path):
    made(tmp_path, "bpe")
    (tmp_path / "tokenizer.json").write_text(train_bpe(STORY[:3000], 290).serialise())
    with pytest.raises(UsageError, match=r"tokenizer\.json is not the one that made the shards"):
        opened(tmp_path)


def rewritten(folder, change):
    content = json.loads((folder / "meta.json").read_text())
    change(content)
    (folder / "meta.json").write_text(json.dumps(content))


def shorter(content):
    content["splits"]["train"]["shards"][0]["tokens"] -= 1
    content["splits"]["train"]["tokens"] -= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shorter, "s_train_000001.bin' holds 2000 tokens, and .* says 1999"),
        (lambda c: c["splits"].pop("val"), "has no validation split"),
        (lambda c: c["splits"].pop("train"), "has no training split"),
        (lambda c: c.update(dtype="uint32"), "holds uint16 by its header, not the uint32 of meta"),
        (lambda c: c.update(vocab_size=100), "token id .* the vocab_size in '.*meta.json' 100"),
        (lambda c: c.update(vocab_size=400), "has 256 ids, and .* vocab_size 400"),
    ],
)
def test_a_meta_that_does_not_fit_its_files_is_refused(tmp_path, change, said):
    made(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(UsageError, match=said):
        opened(tmp_path)


def test_a_missing_or_torn_file_is_refused(tmp_path):
    made(tmp_path)
    path = tmp_path / "s_train_000002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(UsageError, match="s_train_000002.bin' promises"):
        opened(tmp_path)
    path.unlink()
    with pytest.raises(UsageError, match=r"s_train_000002\.bin' is missing"):
        opened(tmp_path)


def test_bare_ids_of_a_folder_have_the_dtype_of_its_meta(tmp_path):
    meta, _, ids = made(tmp_path)
    for split in meta.splits.values():
        for one in split.shards:
            path = tmp_path / one.file
            path.write_bytes(path.read_bytes()[1024:])
    assert opened(tmp_path).train.window(0, 50).tolist() == ids[1000:1050].tolist()
    by_globs = open_bins(f"{tmp_path}/*_train_*.bin", f"{tmp_path}/*_val_*.bin", 300)
    assert by_globs.train.window(0, 50).tolist() == ids[1000:1050].tolist()


def test_a_folder_that_moves_is_the_same_data(tmp_path):
    made(tmp_path / "a")
    first = opened(tmp_path / "a").facts["sha256"]
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert opened(tmp_path / "b").facts["sha256"] == first


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no meta.json: make shards of it by `python -m geon.scripts.prepare_data"),
        ({"a.txt": "words"}, "tokenize"),
        ({"train.bin": "", "val.bin": "", "meta.pkl": ""}, "data.train=.*/train.bin data.val=.*"),
        ({"x_train_000001.bin": "", "x_val_000000.bin": ""}, "data.train='.*/x_train_\\*.bin'"),
    ],
)
def test_a_folder_without_meta_is_answered(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=said):
        opened(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for name, said in (("none", "does not exist"), ("file", "is a file, a folder is needed")):
        with pytest.raises(UsageError, match=f"data.dir '.*{name}' {said}"):
            opened(tmp_path / name)


def test_a_vocabulary_of_zero_is_that_of_the_meta(tmp_path):
    made(tmp_path)
    assert opened(tmp_path, 0).vocab_size == 256
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UsageError, match="data.vocab_size=0 takes the vocabulary of a meta.json"):
        open_bins(f"{tmp_path}/*_train_*.bin", f"{tmp_path}/*_val_*.bin", 0)


def test_reading_a_meta_does_not_need_what_it_names(tmp_path):
    meta, _, _ = made(tmp_path)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    assert read_meta(tmp_path) == meta


def test_a_tokenizer_that_never_lay_there_is_asked_of_no_network(tmp_path, monkeypatch):
    meta, _, _ = made(tmp_path)
    monkeypatch.setattr("geon.data.tokenizers.open_codec", None)  # a call would fail
    write_meta(tmp_path, replace(meta, tokenizer=TokenizerMeta("gpt2")))
    corpus = opened(tmp_path)
    assert corpus.codec is None
    assert "gpt2 does not lie beside" in corpus.facts["no text"]
