"""Text with a cache beside text without, draws beside transformers' own, and stop strings."""

import pytest
import torch

from geon.data import ByteCodec
from geon.engine.generation import Draw, continued
from geon.engine.sample import sample
from geon.engine.spoken import Spoken
from geon.models import MODELS, ModelShape
from geon.scripts import generate

CONTEXT = 24
LIKELIEST = Draw(temperature=0.0)


def made(arch):
    torch.manual_seed(1)
    model = MODELS[arch](ModelShape(60, CONTEXT, 2, 4, 32)).eval()
    with torch.no_grad():
        for param in model.parameters():  # far from uniform, so that the likeliest stands out
            param.copy_(param + 0.5 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("arch", sorted(MODELS))
@pytest.mark.parametrize("length", [1, 7, CONTEXT, CONTEXT + 5])
def test_the_likeliest_tokens_are_those_without_a_cache(arch, length):
    """`sample` runs the last tokens again for each new one; both go past the context here."""
    model, prompt = made(arch), torch.randint(60, (length,))
    alone = sample(model, prompt, 30, temperature=0.0)[length:].tolist()
    assert [ids[0] for ids in continued(model, [prompt], 30, LIKELIEST)] == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_rows_of_a_batch_do_not_see_each_other_or_padding(arch):
    model = made(arch)
    prompts = [torch.randint(60, (length,)) for length in (3, 1, 15)]
    rows = zip(*continued(model, prompts, 30, LIKELIEST), strict=True)
    for prompt, row in zip(prompts, rows, strict=True):
        assert list(row) == sample(model, prompt, 30, temperature=0.0)[len(prompt) :].tolist()


def test_a_token_is_run_once():
    model, seen = made("gpt"), []
    hidden = model.hidden
    model.hidden = lambda tokens, cache: (seen.append(tokens.shape[1]), hidden(tokens, cache))[1]
    list(continued(model, [torch.arange(5)], 10, LIKELIEST))
    assert seen == [5] + [1] * 9


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.5), (0, 0.05), (7, 0.8), (7, 1.0), (0, 1.0)])
def test_tokens_are_drawn_from_what_transformers_leaves(top_k, top_p):
    hf = pytest.importorskip("transformers")
    logits, draws = 3 * torch.randn(1, 40), 4000
    left = logits / 0.7
    if top_k:
        left = hf.TopKLogitsWarper(top_k)(None, left)
    if top_p < 1:
        left = hf.TopPLogitsWarper(top_p)(None, left)
    odds = left.softmax(-1)[0]
    ids = Draw(0.7, top_k, top_p).choose(logits.expand(draws, -1), torch.manual_seed(0))
    shares = torch.bincount(ids, minlength=40) / draws
    assert not shares[odds == 0].any()
    assert (shares - odds).abs().max() < 0.05


def said(text, stops=(), codec=None, past_end=False):
    """Pieces that are given out for the bytes of a text."""
    row = Spoken(codec or ByteCodec(), stops, past_end)
    return [*(row.take(byte) for byte in text.encode()), row.close()], row


def test_characters_come_whole_and_as_soon_as_they_are():
    pieces, row = said("a\u00e9\U0001f600b")
    assert pieces == ["a", "", "\u00e9", "", "", "", "\U0001f600", "b", ""]
    assert row.text == "a\u00e9\U0001f600b"


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),
        ("aaab and", ["aab"], "a"),
        ("x END y STOP", ["STOP", "END"], "x "),
        ("stop", ["stop"], ""),
        ("sto", ["stop"], "sto"),
    ],
)
def test_stop_strings_end_the_text_and_are_not_in_it(text, stops, kept):
    pieces, row = said(text, stops)
    assert "".join(pieces) == row.text == kept


def test_the_end_of_a_document_ends_the_text():
    assert said("one\0two")[1].text == "one"
    assert said("one\0two", past_end=True)[1].text == "one\0two"


def test_text_of_a_tokenizer_that_joins_words_comes_in_pieces():
    class Words(ByteCodec):
        eot = None

        def token_bytes(self):
            return None

        def decode(self, ids):
            return " ".join(chr(i) for i in ids).encode()

    assert said("abc", codec=Words())[0] == ["a", " b", " c", ""]


def test_the_command_prints_one_prompt_as_it_comes_and_several_at_the_end(monkeypatch, capsys):
    model = MODELS["gpt"](ModelShape(256, 64, 1, 1, 16)).eval()
    with torch.no_grad():  # the likeliest byte is always the one after the last
        model.embed.weight.copy_(torch.randn(256, 16))
        for block in model.blocks:
            block.down.weight.zero_()
            block.attention.proj_out.weight.zero_()
        unit = torch.nn.functional.normalize(model.embed.weight, dim=-1)
        model.head.weight.copy_(unit.roll(1, 0))
    monkeypatch.setattr(generate, "load", lambda path, device: (model, ByteCodec()))
    flags = ["run", "--temperature", "0", "--tokens", "5", "--device", "cpu"]
    assert generate.main([*flags, "--prompt", "xa"]) == 0
    assert capsys.readouterr().out == "xabcdef\n"
    assert generate.main([*flags, "--prompt", "a", "--prompt", "ABC", "--stop", "EF"]) == 0
    assert capsys.readouterr().out == "--- 1 ---\nabcdef\n--- 2 ---\nABCD\n"
    for wrong in (["--top-p", "0"], ["--stop", ""], ["--prompt", ""], ["--top-p", "0.5"]):
        assert generate.main([*flags, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err
