"""A stream's windows, its places, and batches of it, against packing written out by hand."""

import gzip
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test needs a network

import datasets
import zstandard

from geon.data import Loader, StreamBatches, load_codec
from geon.data.bpe import train_bpe
from geon.data.hf import Where, identify, open_dataset
from geon.data.stream import Recipe, Stream, held_out, validation
from geon.errors import UsageError

LENGTHS = np.random.default_rng(0).integers(1, 60, 90)
TEXTS = [f"<{i}>" + "x" * int(n) for i, n in enumerate(LENGTHS)]
TEXTS[40] = "<40>" + "long " * 60  # many windows of one document
CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """90 documents in 3 files of JSON lines."""
    root = tmp_path_factory.mktemp("documents")
    for i in range(3):
        rows = [json.dumps({"id": j, "text": text}) for j, text in enumerate(TEXTS)][30 * i :][:30]
        (root / f"{i}.jsonl").write_text("\n".join(rows) + "\n")
    return root


def recipe(folder, parts=1, shuffle=True, seed=0, buffer=8, held=0):
    return Recipe(Where(str(folder)), "bytes", parts, CONTEXT, seed, shuffle, buffer, held)


def opened(of, part=0, place=None):
    return Stream(of, part, open_dataset(of.where), place)


def documents(rows):
    """Texts of windows that follow each other, but for a last one that is cut."""
    ids = np.concatenate([[rows[0, 0]], rows[:, 1:].ravel()])
    assert np.array_equal(rows[1:, 0], rows[:-1, -1])  # a window begins with the last of another
    return bytes(ids.tolist()).decode().split("\0")[1:-1]


def packed(texts):
    ids = np.frombuffer("".join(f"\0{text}" for text in texts).encode(), np.uint8)
    return np.array([ids[i : i + CONTEXT + 1] for i in range(0, len(ids) - CONTEXT, CONTEXT)])


def test_documents_are_packed_without_a_gap_each_behind_a_separator(folder):
    expected = packed(TEXTS * 2)  # the second epoch follows in the same window
    found = opened(recipe(folder, shuffle=False)).windows(len(expected))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_parts_share_an_epoch_without_a_loss_or_a_repetition(folder, parts, shuffle):
    first, second = [], []
    for part in range(parts):
        found = documents(opened(recipe(folder, parts, shuffle), part).windows(450))
        count = len(range(part, len(TEXTS), parts))
        first += found[:count]
        second += found[count : 2 * count]
        assert (found[:count] == found[count : 2 * count]) is not shuffle
    assert sorted(first) == sorted(second) == sorted(TEXTS)


def test_order_depends_on_seed_and_epoch_and_not_on_how_much_is_asked_for(folder):
    first, second = (documents(opened(recipe(folder, seed=s)).windows(500)) for s in (0, 1))
    assert first[:90] != second[:90] and first[:90] != first[90:180]
    assert first[:90] != TEXTS and sorted(first[90:180]) == sorted(TEXTS)
    stream = opened(recipe(folder))
    pieces = [stream.windows(n) for n in (1, 7, 2, 190, 300)]
    assert documents(np.concatenate(pieces)) == first


@pytest.mark.parametrize(("parts", "shuffle"), [(1, True), (3, True), (2, False)])
def test_a_place_goes_on_to_the_same_windows(folder, parts, shuffle):
    of = recipe(folder, parts, shuffle)
    whole = opened(of).windows(400)
    stream = opened(of)
    for at in range(330):
        place = stream.place()
        stream.windows(1)
        if at > 3 and at % 17:
            continue
        again = opened(of, place=json.loads(json.dumps(place)))
        assert np.array_equal(again.windows(70), whole[at : at + 70]), at
        assert len(place["rest"]) <= CONTEXT + 1


def test_what_is_held_out_is_not_trained_on(folder):
    where, codec = Where(str(folder)), load_codec("bytes")
    kept = {text for text in TEXTS if held_out(text, 2000)}
    assert 5 < len(kept) < 35
    trained = set(documents(opened(recipe(folder, held=2000)).windows(400)))
    assert trained == set(TEXTS) - kept
    ids = validation(where, codec, 2000, 0)
    assert bytes(ids.tolist()).decode() == "".join(f"\0{t}" for t in TEXTS if t in kept)
    assert np.array_equal(validation(where, codec, 2000, 50), ids[:51])


def test_kinds_of_files_give_the_same_documents(folder, tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    for name in ("txt", "gz", "zst", "parquet"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "txt" / f"{i:03d}.txt").write_text(text)
    (tmp_path / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "zst" / "a.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "parquet" / "a.parquet")
    expected = packed(TEXTS)
    places = [*(tmp_path / name for name in ("txt", "gz", "zst", "parquet"))]
    for place in [*places, tmp_path / "zst" / "a.jsonl.zst", tmp_path / "parquet" / "a.parquet"]:
        found = opened(recipe(place, shuffle=False)).windows(len(expected))
        assert np.array_equal(found, expected), place


def test_any_codec_gives_its_own_ids_and_its_own_separator(folder, monkeypatch):
    codec = train_bpe("\n".join(TEXTS), 300)
    of = replace(recipe(folder, shuffle=False), codec=codec.serialise())
    monkeypatch.setattr("geon.data.stream.load_codec", lambda _: codec)
    for eot in (None, 7):
        codec.eot = eot
        before = [] if eot is None else [eot]
        ids = [i for text in TEXTS for i in [*before, *codec.encode(text).tolist()]]
        found = opened(of).windows((len(ids) - 1) // CONTEXT)
        assert found[0].tolist() == ids[: CONTEXT + 1]
        assert found[:, 1:].ravel().tolist() == ids[1 : found.shape[0] * CONTEXT + 1]


def test_a_fingerprint_follows_the_files(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    first = identify(Where(str(tmp_path)))
    assert first == identify(Where(str(tmp_path)))
    (tmp_path / "a.txt").write_text("one tex.")
    assert first != identify(Where(str(tmp_path)))


def test_bad_datasets_are_refused_by_their_keys(folder, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    for where, said in [
        (Where(str(folder), field="body"), "no column 'body': set data.field to one of id, text"),
        (Where(str(folder), split="test"), "split 'test'.*cannot be opened"),
        (Where(str(tmp_path)), "several kinds"),
        (Where(str(folder), revision="abc"), "data.revision 'abc'"),
    ]:
        with pytest.raises(UsageError, match=said):
            open_dataset(where)
    with pytest.raises(UsageError, match="part 1 of data.streams 2 has no document"):
        opened(recipe(tmp_path / "a.txt", parts=2), 1).windows(1)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="holds no documents"):
        open_dataset(Where(str(tmp_path / "empty.jsonl")))
    saved = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    for place in ("saved", "saved/train"):
        with pytest.raises(UsageError, match="saved by save_to_disk, and is not streamed: read it"):
            open_dataset(Where(str(tmp_path / place)))
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n{"text": null}\n')
    with pytest.raises(UsageError, match="a row has no text in data.field 'text'"):
        opened(recipe(tmp_path / "c.jsonl")).windows(1)


def batches(folder, rank=0, world=1, workers=0, parts=4, **more):
    return StreamBatches(
        None, CONTEXT, 8, rank, world, 2, recipe=recipe(folder, parts), workers=workers, **more
    )


def test_a_batch_is_the_same_at_any_number_of_ranks_and_any_step_may_be_asked_for(folder):
    alone = batches(folder)
    expected = [alone.windows_at(step) for step in range(40)]
    for world in (2, 4):
        ranks = [batches(folder, rank, world) for rank in range(world)]
        for step in (0, 1, 5, 2, 39, 38, 20, 20):
            found = torch.cat([one.windows_at(step) for one in ranks])
            assert torch.equal(found, expected[step]), step
    places = alone.places_at(37)
    later = batches(folder, begin=(37, 0), places=json_places(places))
    assert torch.equal(later.windows_at(39), expected[39])
    assert later.places_at(37) == places == alone.places_at(37)
    with pytest.raises(UsageError, match="begins at step 37"):
        later.windows_at(36)


def json_places(places):
    return {int(k): v for k, v in json.loads(json.dumps(places)).items()}


@pytest.mark.parametrize(
    ("world", "parts", "workers", "said"),
    [
        (3, 4, 0, "set it to a larger batch"),
        (2, 1, 0, "set it to one of 2, 4, 8"),
        (1, 16, 0, "set it to one of 1, 2, 4, 8"),
        (2, 4, 3, "data.workers 3 is above the 2"),
    ],
)
def test_parts_that_do_not_divide_are_refused(folder, world, parts, workers, said):
    with pytest.raises(UsageError, match=said):
        batches(folder, 0, world, workers, parts)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_loader_reads_a_stream_ahead_of_the_training(folder, ahead):
    plain, loader = batches(folder), Loader(batches(folder), torch.device("cpu"), ahead)
    for step in (0, 1, 2, 4, 5, 3, 4):  # on; over one that is left out; back
        for (x, y), (inputs, targets) in zip(plain.step(step), loader.step(step), strict=True):
            assert torch.equal(x, inputs) and torch.equal(y, targets)
        places = loader._batches.places_at(step + 1)  # as a checkpoint after this step asks
        assert places == plain.places_at(step + 1)
    loader.close()


def test_processes_read_the_same_and_their_end_is_an_error(folder):
    told = []
    plain, beside = batches(folder), batches(folder, workers=2, say=told.append)
    for step in range(30):
        assert torch.equal(plain.windows_at(step), beside.windows_at(step))
    assert plain.places_at(30) == beside.places_at(30)
    assert told[0].startswith("data.dataset: epoch 2 begins with the data of step ")
    beside._live.readers._processes[1].kill()
    with pytest.raises(RuntimeError, match="a process that reads data.dataset ended"):
        for step in range(30, 10_000):  # what it had sent is read first
            beside.windows_at(step)
    beside.close()
    lost = batches(folder / "0.jsonl", workers=1)
    object.__setattr__(lost, "recipe", recipe(folder, 4, held=10_000))
    with pytest.raises(UsageError, match="has no document to train on"):
        lost.windows_at(0)
    lost.close()
