import numpy as np
import pytest

from geon.data import corpus as texts
from geon.engine import build
from geon.errors import UsageError
from tests.docs.blocks import KINDS, NEEDS, PAGES, ROOT, blocks, commands, loose
from tests.docs.commands import take

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(scope="module", autouse=True)
def one_reading_of_the_library():
    """Read Python's library once: it is most of what a plan takes."""
    with pytest.MonkeyPatch.context() as patch:
        read = {}

        def stdlib(percent):
            return read.get(percent) or read.setdefault(percent, texts.stdlib_corpus(percent))

        patch.setattr(build, "stdlib_corpus", stdlib)
        yield


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what pages call yours: text."""
    monkeypatch.chdir(tmp_path)
    for folder in ("my_notes", "notes"):
        (tmp_path / folder).mkdir()
        for number in range(40):
            text = (ROOT / "docs" / "theory.md").read_text()[number * 500 :]
            (tmp_path / folder / f"{number}.txt").write_text(f"{number} {text}")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_could_run_as_printed(page, place, capsys):
    failed, count = [], 0
    for command in commands(page):
        count += 1
        try:
            take(command)
        except (AssertionError, UsageError, SystemExit, ImportError) as error:
            failed.append(f"{command}\n    {error} {capsys.readouterr().err.strip()[-300:]}")
    capsys.readouterr()
    assert not failed, f"{len(failed)} of {count}\n" + "\n".join(failed)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_say_what_they_are(page):
    for block in blocks(page):
        assert block.kind in KINDS, f"{block}: is it bash, python or text?"
        assert set(block.needs) <= NEEDS, block
    assert not loose(page)
