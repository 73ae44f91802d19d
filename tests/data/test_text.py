import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from geon.data import text_corpus
from geon.data.bpe import train_on
from geon.data.corpus import SEPARATOR, split_by_name
from geon.data.stream import held_out
from geon.data.tokenizers import open_codec
from geon.errors import UsageError

ROWS = [f"document {i}: the quick brown fox ÿ 狐" for i in range(60)]


def lines(field="text"):
    return "".join(json.dumps({field: row, "id": i}) + "\n" for i, row in enumerate(ROWS)).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def tokens(split):
    return np.concatenate([np.asarray(s) for s in split.segments])


@pytest.fixture
def tokenizer(tmp_path):
    made = train_on(iter(ROWS), 300, ["<|endoftext|>"])
    return write(tmp_path / "tokenizer.json", made.serialise().encode())


def test_json_lines_are_their_texts_split_by_their_hash(tmp_path):
    corpus = text_corpus(write(tmp_path / "a.jsonl", lines()), 20.0)
    val = [row for row in ROWS if held_out(row, 2000)]
    train = [row for row in ROWS if row not in val]
    assert val and train
    for split, rows in ((corpus.train, train), (corpus.val, val)):
        wanted = b"".join(SEPARATOR + row.encode() for row in rows)
        assert tokens(split).tobytes() == wanted
    assert (corpus.facts["files"], corpus.facts["documents"]) == (1, 60)
    packed = write(tmp_path / "b.jsonl.gz", gzip.compress(lines("body")))
    again = text_corpus(packed, 20.0, field="body")
    assert again.facts["sha256"] == corpus.facts["sha256"]


def test_packed_files_are_split_by_their_names(tmp_path):
    files = {f"{i}.txt": row.encode() for i, row in enumerate(ROWS)}
    for name, content in files.items():
        write(tmp_path / "plain" / name, content)
        write(tmp_path / "packed" / f"{name}.gz", gzip.compress(content))
    corpus = text_corpus(str(tmp_path / "packed"), 20.0)
    names = sorted(f"{name}.gz" for name in files)
    chosen = split_by_name(names, 20.0)
    val = [files[n[:-3]] for n, is_val in zip(names, chosen, strict=True) if is_val]
    assert corpus.val_text == b"".join(SEPARATOR + text for text in val)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/below").symlink_to(tmp_path / "plain")
    assert text_corpus(str(tmp_path / "links"), 20.0).facts["files"] == 60


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_are_cut_at_the_end_of_all(tmp_path, count):
    texts = [f"{i} {'x狐' * 50}" for i in range(count)]
    for i, text in enumerate(texts):
        write(tmp_path / f"f/{i}.txt", text.encode())
    corpus = text_corpus(str(tmp_path / "f"), 3.0)
    whole = "".join(texts).encode()
    train, val = (tokens(s).tobytes().replace(SEPARATOR, b"") for s in (corpus.train, corpus.val))
    assert train + val == whole
    assert len(whole) * 0.03 - 1 <= len(val) < len(whole) * 0.03 + 3


def test_a_tokenizer_puts_its_id_before_each_document(tmp_path, tokenizer):
    codec = open_codec(tokenizer)
    path = write(tmp_path / "a.jsonl", lines())
    corpus = text_corpus(path, 20.0, tokenizer=codec)
    assert (corpus.vocab_size, corpus.codec) == (codec.vocab_size, codec)
    for split, is_val in ((corpus.train, False), (corpus.val, True)):
        rows = [row for row in ROWS if held_out(row, 2000) is is_val]
        wanted = np.concatenate([[codec.eot, *codec.encode(row)] for row in rows])
        assert np.array_equal(tokens(split), wanted)
    assert corpus.codec.decode(tokens(corpus.val)) == corpus.val_text
    other = train_on(iter(ROWS[:9]), 290, ["<|endoftext|>"])
    assert text_corpus(path, 20.0, tokenizer=other).facts["sha256"] != corpus.facts["sha256"]
    by_bytes = text_corpus(path, 20.0, tokenizer=open_codec("bytes"))
    assert by_bytes.facts == text_corpus(path, 20.0).facts


def test_a_tokenizer_without_exact_bytes_is_said(tmp_path):
    words = Tokenizer(models.WordLevel({"the": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = open_codec(write(tmp_path / "tokenizer.json", words.to_str().encode()))
    corpus = text_corpus(write(tmp_path / "a.txt", b"the cat " * 50), 10.0, tokenizer=codec)
    assert "exact bytes" in corpus.facts["no nats/byte"]


def test_what_is_not_utf8_is_left_out_and_counted(tmp_path):
    write(tmp_path / "f/a.jsonl", lines() + b"\xff\n")
    write(tmp_path / "f/b.png", b"\x89PNG\xff")
    clean = text_corpus(write(tmp_path / "g/a.jsonl", lines()), 20.0)
    corpus = text_corpus(str(tmp_path / "f"), 20.0, skip_undecodable=True)
    assert corpus.facts["undecodable"] == "2 left out"
    assert corpus.facts["sha256"] == clean.facts["sha256"]
    with pytest.raises(UsageError, match=r"b.png' is not UTF-8.*data.skip_undecodable"):
        (tmp_path / "f/a.jsonl").unlink()
        text_corpus(str(tmp_path / "f"), 20.0)
    with pytest.raises(UsageError, match=r"1 that are not UTF-8 were left out"):
        text_corpus(str(tmp_path / "f"), 20.0, skip_undecodable=True)


def test_settings_without_effect_are_refused(tmp_path, tokenizer):
    plain = write(tmp_path / "f/a.txt", b"text " * 50)
    with pytest.raises(UsageError, match="data.field 'body' has no effect"):
        text_corpus(plain, 20.0, field="body")
    with pytest.raises(UsageError, match="data.bpe_vocab 300 trains a tokenizer"):
        text_corpus(plain, 20.0, 300, tokenizer=SimpleNamespace(name=tokenizer))
    with pytest.raises(UsageError, match="data.path '.*a.jsonl', line 1 has no field 'text'"):
        text_corpus(write(tmp_path / "a.jsonl", lines("body")), 20.0)
