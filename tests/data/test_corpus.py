import hashlib
import platform
import string
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from geon.data import ByteCodec, load_codec, stdlib_corpus, text_corpus
from geon.data.bpe import _PIECE, BPECodec, train_bpe
from geon.data.corpus import SEPARATOR, join_split, split_by_name
from geon.errors import UsageError

STORY = "The quick brown fox jumps over the lazy dog. ¿Qué? 狐は犬を跳び越える 🦊\n" * 40
ANY_TEXT = st.text(max_size=200)
ASCII = st.text(alphabet=string.printable, max_size=300)


def tokens(split):
    return np.concatenate([np.asarray(s) for s in split.segments])


def write(folder, files):
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_corpus(8.0)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(STORY, 400)


def test_stdlib_is_bytes_and_more_than_4_mb(stdlib):
    for split in (stdlib.train, stdlib.val):
        assert tokens(split).dtype == np.uint8
    assert stdlib.vocab_size == 256
    assert len(stdlib.train) + len(stdlib.val) > 4_000_000
    assert isinstance(stdlib.codec, ByteCodec)
    assert tokens(stdlib.val).tobytes() == stdlib.val_text


def test_stdlib_facts_describe_the_text(stdlib):
    train, val = tokens(stdlib.train).tobytes(), stdlib.val_text
    assert stdlib.facts["sha256"] == hashlib.sha256(train + val).hexdigest()
    assert (stdlib.facts["train_bytes"], stdlib.facts["val_bytes"]) == (len(train), len(val))
    assert stdlib.facts["python"] == platform.python_version()


def test_stdlib_is_the_same_at_every_call(stdlib):
    again = stdlib_corpus(8.0)
    assert again.facts == stdlib.facts
    assert again.val_text == stdlib.val_text


def test_stdlib_puts_every_file_in_exactly_one_split(stdlib):
    train, val = tokens(stdlib.train).tobytes(), stdlib.val_text
    assert train.count(SEPARATOR) + val.count(SEPARATOR) == stdlib.facts["files"]
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py", "typing.py", "asyncio/events.py"):
        piece = SEPARATOR + (root / name).read_bytes() + SEPARATOR
        assert (piece in train + SEPARATOR) != (piece in val + SEPARATOR), name


def test_stdlib_leaves_out_tests_packages_and_other_files(tmp_path, monkeypatch):
    kept = {"a.py": "A", "json/decoder.py": "B", "testing.py": "C", "lib/mytests/d.py": "D"}
    left_out = ("site-packages/e.py", "test/f.py", "lib/tests/g.py", "__pycache__/h.py", "i.txt")
    write(tmp_path, kept | dict.fromkeys(left_out, "LEFT OUT"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = stdlib_corpus(50.0)
    text = tokens(corpus.train).tobytes() + corpus.val_text
    assert sorted(text.split(SEPARATOR)[1:]) == [b"A", b"B", b"C", b"D"]
    assert corpus.facts["files"] == 4


@given(
    names=st.sets(st.text(string.ascii_lowercase + "/._", min_size=1), min_size=1, max_size=30),
    percent=st.floats(0.01, 99.99),
)
@settings(deadline=None)
def test_no_file_is_in_both_splits(names, percent):
    texts = {name: f"<{i}>".encode() for i, name in enumerate(sorted(names))}
    train, val = join_split(texts, percent)
    pieces = train.split(SEPARATOR)[1:] + val.split(SEPARATOR)[1:]
    assert sorted(pieces) == sorted(texts.values())
    is_val = split_by_name(list(texts), percent)
    assert val.split(SEPARATOR)[1:] == [
        text for text, chosen in zip(texts.values(), is_val, strict=True) if chosen
    ]


def test_split_is_by_name_alone_and_near_the_percentage():
    names = [f"folder{i % 7}/file{i}.py" for i in range(20_000)]
    chosen = split_by_name(names, 8.0)
    assert abs(sum(chosen) / len(names) - 0.08) < 0.01
    assert split_by_name(names[::-1], 8.0) == chosen[::-1]
    assert split_by_name(names[500:600], 8.0) == chosen[500:600]
    larger = split_by_name(names, 20.0)
    assert all(more for more, less in zip(larger, chosen, strict=True) if less)


def test_a_file_is_cut_at_its_end(tmp_path):
    text = bytes(range(32, 127)) * 20
    path = write(tmp_path, {"a.txt": text})
    for place in (path, f"{path}/a.txt"):
        corpus = text_corpus(place, 10.0)
        assert tokens(corpus.train).tobytes() + corpus.val_text == text
        assert len(corpus.val) == len(text) // 10
        assert corpus.facts["files"] == 1


@given(
    text=st.text(alphabet="aé狐🦊\u0301", min_size=20, max_size=60), percent=st.floats(15.0, 85.0)
)
@settings(deadline=None)
def test_characters_are_never_cut(text, percent):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, {"a.txt": text})
        corpus = text_corpus(path, percent)
    train = tokens(corpus.train).tobytes()
    assert train.decode() + corpus.val_text.decode() == text
    wanted = len(text.encode()) * percent / 100
    assert wanted - 1 <= len(corpus.val) < wanted + 4


def test_a_folder_is_read_whole_but_for_hidden_files(tmp_path):
    seen = {f"sub{i % 3}/{i}.txt": f"file number {i} ÿ" for i in range(60)}
    hidden = {".secret": "SECRET", "sub1/.cache": b"\xffSECRET", ".git/config": "SECRET"}
    corpus = text_corpus(write(tmp_path, seen | hidden), 30.0)
    train, val = tokens(corpus.train).tobytes(), corpus.val_text
    pieces = train.split(SEPARATOR)[1:] + val.split(SEPARATOR)[1:]
    assert sorted(p.decode() for p in pieces) == sorted(seen.values())
    assert corpus.facts["files"] == len(seen)
    assert (train, val) == join_split(
        {name: seen[name].encode() for name in sorted(seen, key=Path)}, 30.0
    )


def test_a_path_below_a_hidden_folder_is_read(tmp_path):
    path = write(tmp_path, {".home/texts/.a.txt": "hidden", ".home/texts/b.txt": "b" * 100})
    assert text_corpus(f"{path}/.home/texts", 10.0).facts["files"] == 1
    assert text_corpus(f"{path}/.home/texts/.a.txt", 50.0).val_text == b"den"


def test_bpe_corpus_holds_the_same_text_in_fewer_tokens(tmp_path):
    path = write(tmp_path, {"a.txt": STORY})
    as_bytes, as_bpe = text_corpus(path, 10.0), text_corpus(path, 10.0, bpe_vocab=400)
    assert as_bpe.facts == as_bytes.facts
    assert as_bpe.val_text == as_bytes.val_text
    assert as_bpe.vocab_size == as_bpe.codec.vocab_size <= 400
    for name in ("train", "val"):
        ids, text = tokens(getattr(as_bpe, name)), tokens(getattr(as_bytes, name)).tobytes()
        assert as_bpe.codec.decode(ids) == text
        assert len(ids) < 0.6 * len(text)
        assert ids.max() < as_bpe.vocab_size


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    train = "abcd efgh\n" * 200
    first = text_corpus(write(tmp_path / "1", {"a": train + "wxyz" * 50}), 10.0, bpe_vocab=300)
    second = text_corpus(write(tmp_path / "2", {"a": train + "mnop" * 50}), 10.0, bpe_vocab=300)
    assert first.codec.serialise() == second.codec.serialise()


@given(text=ANY_TEXT)
@example("")
@example("\x00\x7f\x80\xa0\xad\u0100\u0143\ufeff\U0010ffff")
@example(" \r\n\t  <|endoftext|> [UNK] ▁Ġ")
@settings(deadline=None)
def test_codecs_are_lossless(bpe, text):
    for codec in (ByteCodec(), bpe):
        ids = codec.encode(text)
        assert codec.decode(ids.tolist()) == codec.decode(ids) == text.encode()
        assert int(codec.token_bytes()[ids].sum()) == len(text.encode())
        assert codec.token_bytes().shape == (codec.vocab_size,)


@given(ids=st.lists(st.integers(0, 10_000), max_size=60))
@settings(deadline=None)
def test_bpe_decodes_any_ids_one_by_one(bpe, ids):
    ids = [i % (bpe.vocab_size + 20) for i in ids]
    assert bpe.decode(ids) == b"".join(bpe.decode([i]) for i in ids)
    own = [i for i in ids if i < bpe.vocab_size]
    assert len(bpe.decode(ids)) == bpe.token_bytes()[own].sum()


@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=50)
def test_a_serialised_codec_is_the_same_codec(bpe, text):
    for codec in (ByteCodec(), bpe):
        again = load_codec(codec.serialise())
        assert type(again) is type(codec)
        assert again.vocab_size == codec.vocab_size
        assert np.array_equal(again.encode(text), codec.encode(text))
        assert np.array_equal(again.token_bytes(), codec.token_bytes())
        assert again.decode(codec.encode(text).tolist()) == text.encode()


@given(text=ASCII)
@settings(deadline=None)
def test_bpe_decodes_ascii_as_the_tokenizers_library_does(bpe, text):
    reference = Tokenizer.from_str(bpe.serialise())
    reference.decoder = decoders.ByteLevel()
    ids = bpe.encode(text).tolist()
    assert bpe.decode(ids).decode() == reference.decode(ids, skip_special_tokens=False) == text


@given(text=st.text(alphabet="ab \n", max_size=400))
@settings(deadline=None, max_examples=15)
def test_long_texts_are_cut_into_pieces_without_loss(bpe, text):
    long = (text + "x" * 500 + "\n") * (2 * _PIECE // 500)
    ids = bpe.encode(long)
    assert bpe.decode(ids) == long.encode()


def test_bpe_starts_from_all_256_bytes(bpe):
    assert sorted(b for b in (bpe.decode([i]) for i in range(bpe.vocab_size)) if len(b) == 1) == [
        bytes([b]) for b in range(256)
    ]
    assert len({bpe.decode([i]) for i in range(bpe.vocab_size)}) == bpe.vocab_size
    assert train_bpe("abab", 256).vocab_size == 256


def test_codecs_decode_arrays_of_any_integers(bpe):
    for codec in (ByteCodec(), bpe):
        ids = codec.encode("hi there").astype(np.int64)
        assert codec.decode(ids) == b"hi there"


def test_codecs_have_no_bytes_for_ids_of_a_padded_vocabulary(bpe):
    for codec in (bpe, ByteCodec()):
        ids = [codec.vocab_size + 44, *codec.encode("hi").tolist(), codec.vocab_size]
        assert codec.decode(ids) == b"hi"


@pytest.mark.parametrize(
    ("files", "arguments", "said"),
    [
        ({}, {"path": ""}, ["data.path", "not set"]),
        ({}, {"path": "nowhere"}, ["data.path", "nowhere", "does not exist"]),
        ({}, {}, ["data.path", "{path}", "no files"]),
        ({".hidden": "text"}, {}, ["data.path", "{path}", "no files"]),
        ({"ok.txt": "fine", "bad.txt": b"abc\xff\xfe"}, {}, ["bad.txt", "byte 3", "0xff"]),
        ({"bad.txt": b"\xe7\x8b"}, {}, ["bad.txt", "byte 0", "0xe7", "data.path"]),
        ({"a.txt": ""}, {}, ["data.path", "{path}", "0 bytes", "data.val_percent 8"]),
        ({"a.txt": "abcdef"}, {}, ["data.path", "{path}", "validation", "data.val_percent 8"]),
        (
            {"a.txt": "🦊🦊"},
            {"val_percent": 90.0},
            ["data.path", "0 bytes of training", "data.val_percent 90"],
        ),
        ({"a": "text" * 9, "b": "text"}, {"val_percent": 0.01}, ["validation", "val_percent 0.01"]),
        ({"a": STORY}, {"bpe_vocab": 255}, ["data.bpe_vocab 255", "256"]),
        ({"a": STORY}, {"bpe_vocab": -1}, ["data.bpe_vocab -1"]),
    ],
)
def test_bad_text_is_refused(tmp_path, files, arguments, said):
    given_arguments = {"path": write(tmp_path, files), "val_percent": 8.0} | arguments
    with pytest.raises(UsageError) as caught:
        text_corpus(**given_arguments)
    missing = [s for s in said if s.format(path=tmp_path) not in str(caught.value)]
    assert not missing, str(caught.value)


def test_a_missing_tokenizers_package_is_named(tmp_path, monkeypatch, bpe):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "geon.data.bpe")
    with pytest.raises(UsageError, match=r"data\.bpe_vocab.*pip install 'geon"):
        text_corpus(write(tmp_path, {"a.txt": STORY}), 8.0, bpe_vocab=300)
    with pytest.raises(UsageError, match=r"pip install 'geon"):
        load_codec(bpe.serialise())
    assert load_codec("bytes").encode("é").tolist() == [0xC3, 0xA9]


def test_load_codec_of_bpe_gives_bpe(bpe):
    assert isinstance(load_codec(bpe.serialise()), BPECodec)
