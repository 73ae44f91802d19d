"""Mixtures: exact shares, an order by (seed, step) alone, and sources checked as if alone."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from geon.configs.changes import Kind, changes, is_place
from geon.data import Batches, Corpus, MixedBatches, Split, load_codec, mixed_corpus
from geon.data.mix import SLOTS, Schedule
from geon.engine.evaluate import Evaluation, together
from geon.errors import UsageError

WEIGHTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), min_size=1)


def counted(weights, samples):
    """Sources of the first samples and counts before them, one after the other."""
    source, before = Schedule(weights).at(np.arange(samples))
    seen = Counter()
    for s, b in zip(source.tolist(), before.tolist(), strict=True):
        assert b == seen[s]
        seen[s] += 1
    return source


@given(weights=WEIGHTS)
@example(weights={"a": 1, "b": 5, "c": 259, "d": 468, "e": 508, "f": 909})  # remainders alike
@settings(deadline=None, max_examples=25)
def test_shares_are_exact_in_every_period_and_close_everywhere(weights):
    source = counted(weights, 2 * SLOTS)
    exact = [Fraction(w * SLOTS, sum(weights.values())) for w in weights.values()]
    left = SLOTS - sum(int(e) for e in exact)
    order = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    counts = [int(e) + (i in order[:left]) for i, e in enumerate(exact)]
    for period in (source[:SLOTS], source[SLOTS:]):
        assert np.bincount(period, minlength=len(counts)).tolist() == counts
    behind = np.arange(1, SLOTS + 1)
    for i, count in enumerate(counts):
        drift = np.cumsum(source[:SLOTS] == i) - behind * count / SLOTS
        assert np.abs(drift).max() <= (len(counts) + 1) / 2


def test_any_sample_is_known_without_those_before_it():
    schedule = Schedule({"a": 2, "b": 1})
    source, before = schedule.at(np.arange(7 * SLOTS))
    far = np.array([3, 6 * SLOTS + 17, 7 * SLOTS - 1])
    assert np.array_equal(schedule.at(far)[0], source[far])
    assert np.array_equal(schedule.at(far)[1], before[far])
    assert Schedule({"a": 2, "b": 1}).at(np.array([10**15]))[1][0] == pytest.approx(
        10**15 * (2 / 3 if schedule.at(np.array([10**15]))[0][0] == 0 else 1 / 3), rel=1e-4
    )


def split(first, windows, context=4):
    return Split(f"from {first}", [np.arange(first, first + windows * context + 1)])


PARTS = (("a", split(0, 50)), ("b", split(10_000, 30)))


def mixed(rank=0, world=1, parts=PARTS, weights=(("a", 3.0), ("b", 1.0)), **more):
    return MixedBatches(None, 4, 8, rank, world, 2, 5, parts=parts, weights=weights, **more)


def test_each_source_is_read_as_if_it_were_alone_in_its_share():
    rows = torch.cat([mixed().windows_at(step) for step in range(25)])
    for name, part, count in (("a", PARTS[0][1], 150), ("b", PARTS[1][1], 50)):
        mine = rows[(rows[:, 0] >= 10_000) == (name == "b")]
        assert len(mine) == count
        alone = Batches(part, 4, count, 0, 1, 2, 5).windows_at(0)
        assert torch.equal(mine, alone)


def test_a_batch_does_not_depend_on_ranks_or_on_the_way_to_it():
    for step in (0, 1, 1000, 123_456):
        alone = mixed().windows_at(step)
        for world in (2, 4):
            ranks = [mixed(rank, world).windows_at(step) for rank in range(world)]
            assert torch.equal(torch.cat(ranks), alone)
    assert torch.equal(mixed(begin=(7, 7 * 8)).windows_at(9), mixed().windows_at(9))


def corpus(name, codec="bytes", part=None):
    one = part or split(ord(name), 3)
    facts = {"name": name, "sha256": name * 64}
    return Corpus(one, one, 256, load_codec(codec) if codec else None, b"", facts)


@pytest.mark.parametrize(
    ("parts", "weights", "said"),
    [
        ({"a": corpus("a"), "b": corpus("b", None)}, {"a": 1, "b": 1},
         "data.mix.a is of bytes and data.mix.b of ids whose tokenizer is not known"),
        ({"a": corpus("a"), "b": corpus("a")}, {"a": 1, "b": 1}, "are the same data"),
        ({"a": corpus("a"), "b": corpus("b")}, {"a": 1, "b": 1e-5}, "data.mix.b.weight 1e-05"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused(parts, weights, said):
    with pytest.raises(UsageError, match=said):
        mixed_corpus(parts, weights)


def test_a_source_too_short_for_a_window_is_refused():
    with pytest.raises(UsageError, match="from 7 has 1 tokens"):
        mixed(parts=(*PARTS, ("c", split(7, 0))))


def test_facts_follow_the_sources_and_say_their_shares():
    one = mixed_corpus({"a": corpus("a"), "b": corpus("b")}, {"a": 3, "b": 1})
    assert one.shares == {"a": 0.75, "b": 0.25} == one.facts["shares"]
    other = mixed_corpus({"a": corpus("a"), "c": corpus("c")}, {"a": 3, "c": 1})
    assert one.facts["sha256"] != other.facts["sha256"]


def test_a_source_may_lie_elsewhere_and_what_it_is_may_not_change():
    assert is_place("data.mix.prose.path") and is_place("data.dataset") and is_place("data.path")
    assert not is_place("data.mix.prose.weight") and not is_place("model.path")
    found = changes({"data.mix.a.weight": 1.0}, {"data.mix.a.weight": 2.0})
    assert [(c.key, c.kind) for c in found] == [("data.mix.a.weight", Kind.refused)]


def test_the_loss_of_a_mixture_is_that_of_its_average_token_and_byte():
    parts = {"a": Evaluation(100, 2.0, 1.0), "b": Evaluation(900, 4.0, 1.0)}
    found = together(parts, {"a": 0.75, "b": 0.25})
    assert (found.tokens, found.nats_per_token) == (1000, 2.5)
    assert found.nats_per_byte == pytest.approx(2.5 / (0.75 * 2 + 0.25 * 4))
    assert found.to_dict()["val_nats_per_token.b"] == 4.0
    unknown = together({**parts, "b": Evaluation(900, 4.0, None)}, {"a": 0.75, "b": 0.25})
    assert unknown.nats_per_byte is None
