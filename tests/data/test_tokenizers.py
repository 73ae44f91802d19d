"""Codecs by name, against the packages' own encoders."""

import json

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from geon.data.bpe import BPECodec, byte_of_symbol, train_on
from geon.data.codec import load_codec
from geon.data.fast import FastBPE
from geon.data.tokenizers import open_codec
from geon.errors import UsageError

STORY = "".join(
    f"{i % 7} ties, it's naïve\n\n  {i % 3}\t狐 {'ab' * (i % 9)}  \n" for i in range(900)
)
EOT = "<|endoftext|>"


@pytest.fixture(scope="module")
def codec():
    return train_on(iter([STORY]), 600, [EOT])


@pytest.fixture
def files(tmp_path, codec):
    (tmp_path / "tokenizer.json").write_text(codec.serialise())
    return tmp_path


def plain(codec):
    """The same tokenizer by `tokenizers` alone."""
    made = Tokenizer.from_str(codec.serialise())
    made.encode_special_tokens = True
    return made


def test_a_file_or_its_folder_is_opened(files, codec):
    for name in (str(files), str(files / "tokenizer.json")):
        found = open_codec(name)
        assert (found.name, found.fingerprint, found.eot) == (name, codec.fingerprint, 0)
        assert found.encode(STORY).tolist() == plain(codec).encode(STORY).ids
    again = load_codec(codec.serialise())
    assert (again.fingerprint, again.eot) == (codec.fingerprint, 0)


def test_gpt2s_two_files_are_opened(tmp_path, codec):
    content = json.loads(codec.serialise())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in content["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    found = open_codec(str(tmp_path))
    assert (found.eot, found.vocab_size) == (0, codec.vocab_size)
    assert found.encode(STORY).tolist() == codec.encode(STORY).tolist()


@given(text=st.text(max_size=300) | st.text(alphabet="ab1 \n\t'st狐", max_size=300))
@example(f"it's {EOT} \u00a0 x \u2028\r\n\x1c  ")
@settings(deadline=None, max_examples=150)
def test_both_ways_give_the_ids_of_both_packages(codec, text):
    assert isinstance(codec._fast, FastBPE)
    own = codec.encode(text)
    assert own.tolist() == plain(codec).encode(text, add_special_tokens=False).ids
    content, symbols = json.loads(codec.serialise())["model"], byte_of_symbol()
    ranks = {bytes(symbols[c] for c in t): i for t, i in content["vocab"].items() if t != EOT}
    order = sorted(ranks, key=ranks.__getitem__)
    other = tiktoken.Encoding(
        "own",
        pat_str=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={piece: rank for rank, piece in enumerate(order)},
        special_tokens={},
    )
    assert [ranks[order[i]] for i in other.encode_ordinary(text)] == own.tolist()
    assert codec.decode(own) == text.encode()
    assert int(codec.token_bytes()[own].sum()) == len(text.encode())


def test_pieces_have_the_ids_of_the_whole(codec, monkeypatch):
    monkeypatch.setattr("geon.data.bpe._PIECE", 50)
    cut = BPECodec(codec.serialise())
    for fast in (cut._fast, None):
        cut._fast = fast
        assert cut.encode(STORY).tolist() == plain(codec).encode(STORY).ids


def test_the_fast_way_is_left_where_it_would_differ(codec):
    """A merge that its own bytes never come to: `tokenizers` ignores it, `tiktoken` does not."""
    content = json.loads(codec.serialise())
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    symbols = [*byte_of_symbol(), *("".join(pair) for pair in merges)]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    content["model"] |= {"vocab": vocab, "merges": merges}
    content["added_tokens"] = []
    odd = BPECodec(json.dumps(content))
    assert odd._fast is None
    assert odd.encode("abc").tolist() == [vocab["a"], vocab["bc"]]
    content["model"]["merges"] = [["a", "b"], ["b", "c"], ["ab", "c"]]
    assert BPECodec(json.dumps(content)).encode("abc").tolist() == [vocab["abc"]]


def test_a_special_token_has_no_bytes(codec):
    ids = [codec.eot, *codec.encode("hi").tolist()]
    assert codec.decode(ids) == b"hi"
    assert codec.token_bytes()[codec.eot] == 0
    assert codec.eot not in codec.encode(EOT)


def test_the_end_of_a_document_is_the_tokenizers_own(tmp_path, codec):
    """By its name; else the eos_token of tokenizer_config.json, also in a checkpoint; else none."""
    content = json.loads(codec.serialise())
    odd = content["added_tokens"][0] | {"content": "<fin>"}
    content["added_tokens"] = [odd]
    content["model"]["vocab"] = {
        {EOT: "<fin>"}.get(token, token): i for token, i in content["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert open_codec(str(tmp_path)).eot is None
    config = tmp_path / "tokenizer_config.json"
    for told in ("<fin>", {"content": "<fin>", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": told}))
        found = open_codec(str(tmp_path))
        again = load_codec(found.serialise())
        assert (found.eot, again.eot, again.fingerprint) == (0, 0, found.fingerprint)
        assert found.encode(STORY).tolist() == codec.encode(STORY).tolist()
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UsageError, match="'<none>', which is no token of tokenizer.json"):
        open_codec(str(tmp_path))


def test_words_that_reach_over_spaces_are_not_cut_into_pieces(codec, monkeypatch):
    monkeypatch.setattr("geon.data.bpe._PIECE", 50)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = "of the cat and the dog of the house " * 20
    made.train_from_iterator([text], trainer)
    assert BPECodec(made.to_str()).encode(text).tolist() == made.encode(text).ids


def test_cuts_and_pads_of_a_file_are_left_out(codec):
    made = Tokenizer.from_str(codec.serialise())
    made.enable_truncation(5)
    made.enable_padding(length=400)
    assert np.array_equal(
        BPECodec(made.to_str()).encode("a b c d e f g"), codec.encode("a b c d e f g")
    )


def test_a_tokenizer_that_loses_bytes_has_no_lengths():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"])
    made.train_from_iterator([STORY], trainer)
    made.add_special_tokens([AddedToken("[SEP]")])
    codec = BPECodec(made.to_str())
    assert codec.token_bytes() is None
    assert codec.encode("It's TIES").tolist() == made.encode("It's TIES").ids
    assert codec.eot is None
    assert codec.decode(codec.encode("TIES")) != b"TIES"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/x", "no such file or folder"),
        ("missing/tokenizer.json", "no such file or folder"),
        ("{tmp}", "holds no tokenizer.json"),
        ("train:4096", "for prepare_data; data=text trains one by data.bpe_vocab=4096"),
        ("{tmp}/bad.json", "cannot be read"),
    ],
)
def test_other_names_are_refused(tmp_path, name, said):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=said):
        open_codec(name.format(tmp=tmp_path))


def test_a_hub_that_is_not_there_is_one_message(monkeypatch):
    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UsageError, match=r"gpt2.*no network.*give the path of a tokenizer.json"):
        open_codec("gpt2")
