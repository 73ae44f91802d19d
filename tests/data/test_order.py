import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geon.data import Batches, Split, sample_index
from geon.data.order import permute
from geon.errors import UsageError

KEYS = st.integers(0, 2**40 - 1)
POWERS = sorted({2**b + d for b in range(17) for d in (-1, 0, 1)} - {0})


def counting_split(tokens, segments=1):
    """Tokens that say their own position, so that every window names itself."""
    return Split("counting tokens", np.array_split(np.arange(tokens), segments))


def is_permutation(out, length):
    return np.array_equal(np.sort(out), np.arange(length))


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_permute_is_a_bijection_for_every_length_to_2000():
    wrong = [n for n in range(1, 2001) if not is_permutation(permute(np.arange(n), n, 7 * n), n)]
    assert not wrong


@pytest.mark.parametrize("key", [0, 1, 2**40 - 1])
def test_permute_is_a_bijection_at_powers_of_two_and_their_neighbours(key):
    wrong = [n for n in POWERS if not is_permutation(permute(np.arange(n), n, key), n)]
    assert not wrong


@given(length=st.integers(1, 2000), key=KEYS)
@settings(deadline=None)
def test_permute_is_a_bijection_for_every_key(length, key):
    assert is_permutation(permute(np.arange(length), length, key), length)


@given(length=st.integers(1, 2000), key=KEYS, data=st.data())
@settings(deadline=None, max_examples=50)
def test_permute_maps_each_index_alone(length, key, data):
    some = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20))
    whole = permute(np.arange(length), length, key)
    assert np.array_equal(permute(np.array(some), length, key), whole[some])


@given(length=st.integers(2**33, 2**46), key=KEYS)
@settings(deadline=None, max_examples=25)
def test_permute_stays_in_range_and_injective_beyond_32_bits(length, key):
    some = np.unique(np.linspace(0, length - 1, 100).astype(np.int64))
    out = permute(some, length, key)
    assert out.min() >= 0
    assert out.max() < length
    assert len(np.unique(out)) == len(some)


@given(
    seed=st.integers(-(2**31), 2**31),
    windows=st.integers(1, 500),
    epoch=st.integers(0, 50),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_every_epoch_reads_every_window_once(seed, windows, epoch, shuffle):
    out = sample_index(seed, epoch * windows, windows, windows, shuffle)
    assert is_permutation(out, windows)


@given(
    first=st.integers(0, 3000),
    counts=st.lists(st.integers(0, 100), min_size=2, max_size=4),
    windows=st.integers(1, 700),
)
@settings(deadline=None, max_examples=50)
def test_samples_do_not_depend_on_how_they_are_asked_for(first, counts, windows):
    starts = first + np.cumsum([0, *counts[:-1]])
    pieces = [
        sample_index(3, int(s), c, windows, True) for s, c in zip(starts, counts, strict=True)
    ]
    whole = sample_index(3, first, sum(counts), windows, True)
    assert np.array_equal(np.concatenate(pieces), whole)


def test_epochs_and_seeds_differ():
    orders = [
        tuple(sample_index(seed, epoch * 100, 100, 100, True))
        for seed in range(10)
        for epoch in range(10)
    ]
    assert len(set(orders)) == len(orders)


def test_without_shuffle_the_order_is_that_of_the_text():
    out = sample_index(5, 7, 30, 10, shuffle=False)
    assert np.array_equal(out, (7 + np.arange(30)) % 10)


@pytest.mark.parametrize("windows", [1000, 4096, 35_000])
def test_consecutive_samples_are_uncorrelated(windows):
    epochs = sample_index(11, 0, 20 * windows, windows, True).reshape(20, windows)
    z = [np.corrcoef(e[:-1], e[1:])[0, 1] * np.sqrt(windows) for e in epochs]
    assert np.abs(z).max() < 5
    assert np.sqrt(np.mean(np.square(z))) < 1.6


@pytest.mark.parametrize("windows", [1000, 4096, 35_000])
def test_position_and_next_epoch_say_nothing_about_a_window(windows):
    epochs = sample_index(11, 0, 20 * windows, windows, True).reshape(20, windows)
    place = np.arange(windows)
    z = [np.corrcoef(place, e)[0, 1] * np.sqrt(windows) for e in epochs]
    z += [np.corrcoef(a, b)[0, 1] * np.sqrt(windows) for a, b in zip(epochs, epochs[1:])]  # noqa: B905
    assert np.abs(z).max() < 5
    assert np.sqrt(np.mean(np.square(z))) < 1.6


@pytest.mark.parametrize("windows", [64, 256, 1024])
def test_each_sample_is_uniform_over_the_windows(windows):
    epochs = sample_index(0, 0, 1000 * windows, windows, True).reshape(1000, windows)
    for position in range(0, windows, windows // 16):
        counts = np.bincount(epochs[:, position] * 8 // windows, minlength=8)
        assert chi_square(counts) < 40, f"sample {position}: windows by eighths {counts}"


@pytest.mark.parametrize("windows", [64, 256, 1024])
def test_an_epoch_leaves_one_window_in_its_place_on_average(windows):
    # A uniform permutation has 1 fixed point on average, and its square 2; variances 1 and 5 here.
    epochs = sample_index(0, 0, 1000 * windows, windows, True).reshape(1000, windows)
    place = np.arange(windows)
    fixed = (epochs == place).sum(axis=1).mean()
    twice = (np.take_along_axis(epochs, epochs, axis=1) == place).sum(axis=1).mean()
    assert fixed == pytest.approx(1.0, abs=0.2)
    assert twice == pytest.approx(2.0, abs=0.45)


@given(
    world=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 9),
    micro=st.integers(1, 12),
    step=st.integers(0, 40),
    windows=st.integers(1, 60),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_ranks_together_read_the_batch_of_one_rank(world, share, micro, step, windows, shuffle):
    context = 5
    split = counting_split(windows * context + 3, segments=3)
    sequences = 4 * share

    def read(rank, ranks, size):
        batches = Batches(split, context, sequences, rank, ranks, size, 9, shuffle).step(step)
        assert all(len(x) <= size for x, _ in batches)
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    alone = read(0, 1, sequences)
    parts = [read(rank, world, micro) for rank in range(world)]
    assert torch.equal(torch.cat([x for x, _ in parts]), alone[0])
    assert torch.equal(torch.cat([y for _, y in parts]), alone[1])
    expected = sample_index(9, step * sequences, sequences, windows, shuffle) * context
    assert alone[0][:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 6])
def test_accumulation_counts_the_micro_batches(world, micro):
    batches = Batches(counting_split(500), 4, 4 * 6, 0, world, micro)
    assert [len(x) for x, _ in batches.step(0)] == [micro] * batches.accumulation


def test_targets_are_inputs_shifted_by_one():
    tokens = np.random.default_rng(0).integers(0, 250, 1001).astype(np.uint8)
    batches = Batches(Split("bytes", [tokens[:300], tokens[300:]]), 10, 100, 0, 1, 7, shuffle=False)
    parts = batches.step(0)
    inputs, targets = (torch.cat(side) for side in zip(*parts, strict=True))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (100, 10)
    assert torch.equal(inputs.flatten(), torch.from_numpy(tokens[:-1].astype(np.int64)))
    assert torch.equal(targets.flatten(), torch.from_numpy(tokens[1:].astype(np.int64)))


@pytest.mark.parametrize(("windows", "sequences"), [(10, 4), (7, 4), (3, 8), (1, 4)])
def test_nothing_is_lost_or_read_twice_across_epoch_borders(windows, sequences):
    batches = Batches(counting_split(windows * 6 + 1), 6, sequences, 0, 1, 2)
    seen = [
        int(x[0]) // 6 for step in range(windows) for part, _ in batches.step(step) for x in part
    ]
    assert np.array_equal(np.bincount(seen), np.full(windows, sequences))
    for epoch in range(sequences):
        assert is_permutation(np.array(seen[epoch * windows : (epoch + 1) * windows]), windows)


def test_seed_changes_what_a_step_reads():
    first, second = (Batches(counting_split(4001), 4, 8, 0, 1, 8, seed).step(0) for seed in (0, 1))
    assert not torch.equal(first[0][0], second[0][0])


@pytest.mark.parametrize(("tokens", "windows"), [(9, 1), (16, 1), (17, 2), (81, 10)])
def test_a_window_needs_one_token_more_than_the_context(tokens, windows):
    assert Batches(counting_split(tokens), 8, 1, 0, 1, 1).windows == windows


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_too_little_text_is_refused(tokens):
    with pytest.raises(UsageError, match="counting tokens.*model.context 8") as caught:
        Batches(counting_split(tokens), 8, 1, 0, 1, 1)
    assert f" {tokens} tokens" in str(caught.value)
