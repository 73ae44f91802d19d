"""What is fetched is whole and right, or absent, whatever the server does."""

import errno
import hashlib
import shutil
import threading
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest

from geon.data import download
from geon.data.download import fetch_all, locked
from geon.data.hub import list_files
from geon.data.web import DownloadError, Patience, request
from geon.errors import UsageError
from tests.data.hub import COMMIT, Hub, serving

pytestmark = pytest.mark.row("R35")
QUICK = Patience(tries=4, first=0.01, most=0.02, asked=0.05, timeout=5)
RNG = np.random.default_rng(0)
CONTENT = {name: RNG.bytes(3_000_000) for name in ("a_train_1.bin", "a_train_2.bin", "a_val_0.bin")}


@pytest.fixture
def hub():
    made = Hub(dict(CONTENT))
    with serving(made) as made.address:
        yield made


def listed(hub, wanted=lambda path: True):
    return list_files(hub.address, "datasets", hub.repo, wanted, QUICK)[1]


def fetched(hub, folder, check=lambda path: None, at_once=3):
    return fetch_all(listed(hub), folder, lambda here: None, check, at_once, QUICK)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_whole(folder, content=None):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == (content or CONTENT)


def test_the_list_of_a_repository_is_of_one_commit_with_sizes_and_checksums(hub):
    hub.files["sub/more.json"] = b"{}"
    hub.behind = "https://hub.example"
    commit, found = list_files(hub.address, "datasets", hub.repo, lambda p: True, QUICK)
    assert commit == COMMIT
    assert [one.name for one in found] == [*sorted(CONTENT), "more.json"]
    assert [one.size for one in found] == [3_000_000] * 3 + [2]
    sha = hashlib.sha256(CONTENT["a_train_1.bin"]).hexdigest()
    assert (found[0].digest, found[0].git) == (sha, False)
    # `printf '{}' | git hash-object --stdin`
    assert (found[3].digest, found[3].git) == ("9e26dfeeb6e641a33dae4961196235bdb965b21b", True)
    assert all(COMMIT in one.url for one in found)


def test_files_come_whole_and_a_second_run_fetches_nothing(hub, tmp_path):
    hub.files["notes.json"] = b'{"a": 1}'
    seen = []
    fetch_all(listed(hub), tmp_path, seen.append, lambda path: None, 2, QUICK)
    assert_whole(tmp_path, hub.files)
    assert seen[-1] == 9_000_008
    hub.asked.clear()
    fetched(hub, tmp_path)
    assert hub.asked == []


FAULTS = {
    "cut connections": ["cut:1200000", "cut:1100000", "cut:5"],
    "cut before the first byte": ["cut:0", "cut:0"],
    "no Range": ["cut:1500000", "whole"],
    "too many requests": ["status:429:0.01", "status:503:0.01", "status:429"],
    "gateway": ["status:502", "status:504", "cut:100", "status:500"],
    "another range": ["cut:1500000", "shifted"],
    "a page in its place": ["short"],
    "other bytes": ["other"],
    "other bytes at the end": ["cut:2000000", "other"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_comes_whole_in_spite_of(hub, tmp_path, name):
    hub.faults["a_train_1.bin"] += FAULTS[name]
    if name == "gateway":  # four in a row end it, and the cut one gave less than a MiB
        with pytest.raises(DownloadError, match=r"500 .*last of 4 tries"):
            fetched(hub, tmp_path)
        assert "a_train_1.bin" not in names(tmp_path)
    fetched(hub, tmp_path)
    assert_whole(tmp_path)


def test_what_came_before_a_cut_is_not_fetched_again(hub, tmp_path):
    hub.faults["a_train_1.bin"] += ["cut:1200000", "cut:1100000"]
    fetched(hub, tmp_path, at_once=1)
    asked = [span for name, span in hub.asked if name == "a_train_1.bin"]
    assert asked == [None, "bytes=1200000-", "bytes=2300000-"]


def test_another_process_goes_on_with_what_is_there(hub, tmp_path):
    hub.faults["a_train_1.bin"] += ["cut:1200000", *["status:503"] * 4]
    with pytest.raises(DownloadError, match="what was fetched is kept"):
        fetched(hub, tmp_path, at_once=1)
    (part,) = tmp_path.glob("a_train_1.bin.*.part")
    assert part.read_bytes() == CONTENT["a_train_1.bin"][:1_200_000]
    hub.asked.clear()
    fetched(hub, tmp_path, at_once=1)
    assert hub.asked[0] == ("a_train_1.bin", "bytes=1200000-")
    assert_whole(tmp_path)


@pytest.mark.parametrize("torn", [b"\0" * 1_000_000, b"\0" * 3_000_000, b"\0" * 4_000_000])
def test_a_part_with_wrong_bytes_is_thrown_away(hub, tmp_path, torn):
    (remote,) = listed(hub, lambda path: path == "a_train_1.bin")
    remote.part(tmp_path).write_bytes(torn)
    fetched(hub, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("fault", "said"), [("404", "404"), ("403", "private or gated"), ("401", "401")]
)
def test_an_answer_that_stays_ends_at_once(hub, tmp_path, fault, said):
    hub.faults["a_train_1.bin"] += [f"status:{fault}"]
    with pytest.raises(DownloadError, match=f"a_train_1.bin: .*{said}"):
        fetched(hub, tmp_path)
    assert "a_train_1.bin" not in names(tmp_path)
    assert len([1 for name, _ in hub.asked if name == "a_train_1.bin"]) == 1


def test_a_wrong_checksum_is_never_kept(hub, tmp_path):
    hub.digests["a_train_1.bin"] = "ab" * 32
    with pytest.raises(DownloadError, match="checksum .* list says abababababababab.*, twice"):
        fetched(hub, tmp_path)
    assert not list(tmp_path.glob("a_train_1*"))


@pytest.mark.parametrize("size", [2_999_999, 3_000_001])
def test_a_wrong_size_is_never_kept(hub, tmp_path, size):
    hub.sizes["a_train_1.bin"] = size
    with pytest.raises(DownloadError, match=f"sends 3000000 bytes, its list says {size}"):
        fetched(hub, tmp_path)
    assert "a_train_1.bin" not in names(tmp_path)


def test_a_wrong_file_under_the_name_is_moved_and_named(hub, tmp_path):
    (tmp_path / "a_train_1.bin").write_bytes(b"\0" * 3_000_000)
    (tmp_path / "a_val_0.bin").write_bytes(CONTENT["a_val_0.bin"][:-1])
    moved = fetched(hub, tmp_path)
    assert sorted(path.name for path in moved) == ["a_train_1.bin.wrong", "a_val_0.bin.wrong"]
    for path in moved:
        path.unlink()
    assert_whole(tmp_path)


def test_what_is_whole_and_no_shard_gets_no_name(hub, tmp_path):
    def check(path):
        raise UsageError("no shard")

    with pytest.raises(UsageError, match="no shard"):
        fetched(hub, tmp_path, check)
    assert not set(CONTENT) & set(names(tmp_path))


def test_a_server_that_is_not_there_is_one_message(tmp_path):
    with serving(Hub({})) as address:
        pass
    with pytest.raises(DownloadError, match=r"refused .* tries"):
        list_files(address, "datasets", "some/set", lambda path: True, QUICK)


@pytest.mark.parametrize(
    ("endpoint", "repo", "said"),
    [
        ("file:///etc", "some/set", "must be an address"),
        ("huggingface", "some/set", "must be an address"),
        ("{}", "set", "OWNER/NAME"),
        ("{}", "some/../set", "OWNER/NAME"),
        ("{}", "some/other", "404"),
    ],
)
def test_addresses_and_names_that_cannot_be_are_refused(hub, endpoint, repo, said):
    with pytest.raises((UsageError, DownloadError), match=said):
        list_files(endpoint.format(hub.address), "datasets", repo, lambda path: True, QUICK)


@pytest.mark.parametrize("path", ["..", "sub/.hidden", "a\\b", "a\nb", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(hub, path):
    hub.files[path] = b"x"
    with pytest.raises(DownloadError, match="bad line"):
        listed(hub)


def test_two_files_of_one_name_are_refused(hub):
    hub.files["sub/a_val_0.bin"] = b"x"
    with pytest.raises(UsageError, match="two files of the name 'a_val_0.bin'"):
        listed(hub)


@pytest.mark.parametrize("failing", [0, 2_500_000])
def test_a_full_disk_is_one_message_and_what_came_is_gone_on_with(
    hub, tmp_path, monkeypatch, failing
):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        if failing == 0:  # seen before anything is fetched
            patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_999_999))
        else:
            body = download._body

            def full(remote, have, timeout):
                for piece in body(remote, have, timeout):
                    yield piece
                    if (have := have + len(piece)) > failing:
                        raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(download, "_body", full)
        with pytest.raises(DownloadError, match=r"GB free, .* same command again"):
            fetched(hub, tmp_path)
        assert (hub.asked == []) == (failing == 0)
    fetched(hub, tmp_path)
    assert_whole(tmp_path)


def test_an_interrupt_stops_all_threads_and_what_came_is_gone_on_with(hub, tmp_path):
    def interrupt(here):
        if here > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_all(listed(hub), tmp_path, interrupt, lambda path: None, 1, QUICK)
    assert threading.active_count() < 10
    fetched(hub, tmp_path)
    assert_whole(tmp_path)


def test_two_processes_do_not_fetch_into_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(DownloadError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_waiting_is_bounded_and_follows_the_server():
    patience = Patience(tries=9, first=1, most=8, asked=100)
    assert [patience.seconds(n, 0) for n in range(1, 7)] == [1, 2, 4, 8, 8, 8]
    assert patience.seconds(1, 30) == 30
    assert patience.seconds(1, 1e9) == 100


@pytest.mark.parametrize(("header", "low", "high"), [("7", 7, 7), ("-3", 0, 0), ("soon", 0, 0)])
def test_retry_after_is_seconds_or_a_date(hub, header, low, high):
    hub.faults["a_val_0.bin"] += [f"status:503:{header}"]
    with pytest.raises(Exception, match="503") as caught:
        request(f"{hub.address}/cdn/0/a_val_0.bin", 5)
    assert low <= caught.value.asked <= high


def test_retry_after_may_be_a_date():
    from geon.data.web import _asked

    assert 50 < _asked(formatdate(__import__("time").time() + 60, usegmt=True)) <= 60
    assert _asked(None) == 0


def test_parts_are_beside_their_files(hub, tmp_path):
    remote = listed(hub)[0]
    assert remote.part(tmp_path).parent == Path(tmp_path)
    assert remote.part(tmp_path).name == f"a_train_1.bin.{remote.digest[:12]}.part"


def test_the_hub_of_these_tests_is_one_to_its_own_client(hub, monkeypatch):
    hub_client = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this host is here
    hub.files["notes.json"] = b"{}"
    api = hub_client.HfApi(endpoint=hub.address, token=False)
    rows = api.list_repo_tree(hub.repo, repo_type="dataset", recursive=True, revision=COMMIT)
    theirs = {
        row.path: (row.size, row.lfs.sha256 if row.lfs else row.blob_id)
        for row in rows
        if hasattr(row, "blob_id")
    }
    assert theirs == {one.name: (one.size, one.digest) for one in listed(hub)}
    assert api.repo_info(hub.repo, repo_type="dataset", revision="main").sha == COMMIT
