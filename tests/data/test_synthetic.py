import math

import numpy as np
import pytest

from geon.data import synthetic_corpus
from geon.errors import UsageError

ENTROPY = 1.213  # of 8:4:2:2, as the docstring promises


def all_tokens(corpus):
    parts = [*corpus.train.segments, *corpus.val.segments]
    return np.concatenate(parts).astype(np.int64)


def conditional_entropy(ids, vocab):
    """Plug-in entropy in nats of a token given the one before it."""
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    row = pairs.sum(axis=1, keepdims=True)
    joint, given_last = pairs[pairs > 0] / pairs.sum(), (pairs / np.maximum(row, 1))[pairs > 0]
    return float(-(joint * np.log(given_last)).sum())


def test_the_promised_entropy_is_that_of_the_odds():
    odds = np.array([8, 4, 2, 2]) / 16
    assert math.isclose(-(odds * np.log(odds)).sum(), ENTROPY, abs_tol=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_entropy_rate_is_within_3_percent_of_the_promise(seed):
    ids = all_tokens(synthetic_corpus(64, 200_000, 8.0, seed))
    assert conditional_entropy(ids, 64) == pytest.approx(ENTROPY, rel=0.03)


def test_equal_seeds_give_equal_tokens():
    first, second = (synthetic_corpus(64, 5000, 8.0, seed=3) for _ in range(2))
    assert np.array_equal(all_tokens(first), all_tokens(second))
    assert first.facts == second.facts


def test_seeds_differ():
    first, second = (synthetic_corpus(64, 5000, 8.0, seed=s) for s in (3, 4))
    assert not np.array_equal(all_tokens(first), all_tokens(second))
    assert first.facts["sha256"] != second.facts["sha256"]


@pytest.mark.parametrize(
    ("tokens", "percent"), [(1000, 8.0), (1000, 0.01), (777, 50.0), (10, 99.0)]
)
def test_splits_hold_all_tokens_and_facts_count_them(tokens, percent):
    corpus = synthetic_corpus(16, tokens, percent)
    assert len(corpus.train) + len(corpus.val) == tokens
    assert len(corpus.val) == max(2, int(tokens * percent / 100))
    assert corpus.facts["train_tokens"] == len(corpus.train)
    assert corpus.facts["val_tokens"] == len(corpus.val)


@pytest.mark.parametrize("vocab", [4, 64, 300, 65_536])
def test_ids_are_below_the_vocabulary_and_have_at_most_four_followers(vocab):
    corpus = synthetic_corpus(vocab, 20_000, 8.0)
    ids = all_tokens(corpus)
    assert corpus.vocab_size == vocab
    assert ids.max() < vocab
    pairs = np.unique(ids[:-1] * vocab + ids[1:])
    assert np.unique(pairs // vocab, return_counts=True)[1].max() <= 4


@pytest.mark.parametrize("tokens", [-5, 0, 1])
def test_too_few_tokens_are_refused(tokens):
    with pytest.raises(UsageError, match=rf"data\.tokens.*{tokens}"):
        synthetic_corpus(64, tokens, 8.0)


def test_a_vocabulary_that_16_bits_do_not_hold_is_refused_or_kept_whole():
    try:
        ids = all_tokens(synthetic_corpus(200_000, 20_000, 8.0))
    except UsageError as error:
        assert "data.vocab_size" in str(error)
    else:
        assert ids.max() >= 65_536


def test_a_negative_seed_is_as_good_as_any():
    ids = all_tokens(synthetic_corpus(64, 100, 8.0, seed=-1))
    assert len(ids) == 100
