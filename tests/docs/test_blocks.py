"""What the documents print can be typed: composed, planned or parsed here, and run by `-m slow`."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from geon.data import corpus as texts
from geon.data.shards import write_bin
from geon.engine import build
from geon.errors import UsageError
from geon.scripts import prepare_data
from tests.docs import toys
from tests.docs.blocks import KINDS, NEEDS, PAGES, ROOT, blocks, commands, loose
from tests.docs.commands import TARGETS, recipe, take

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
SCRIPTS = [b for page in PAGES for b in blocks(page) if b.kind == "bash" and not b.needs]
SNIPPETS = [b for page in PAGES for b in blocks(page) if b.kind == "python"]
WRONG = (AssertionError, UsageError, SystemExit, ImportError)


@pytest.fixture(scope="module", autouse=True)
def one_reading_of_the_library():
    """Read Python's library once: it is most of what a plan takes."""
    with pytest.MonkeyPatch.context() as patch:
        read = {}

        def stdlib(percent):
            return read.get(percent) or read.setdefault(percent, texts.stdlib_corpus(percent))

        patch.setattr(build, "stdlib_corpus", stdlib)
        yield


@pytest.fixture(scope="module")
def yours(tmp_path_factory):
    """A folder with what the pages call yours: text, and files of ids."""
    folder = tmp_path_factory.mktemp("yours")
    lines = (ROOT / "docs" / "theory.md").read_text("utf-8").splitlines()
    (folder / "my_notes").mkdir()
    for number in range(40):
        text = f"{number}\n" + "\n".join(lines[number * 7 :])
        (folder / "my_notes" / f"{number}.txt").write_text(text, "utf-8")
    with gzip.open(folder / "rows.jsonl.gz", "wt") as rows:
        rows.writelines(json.dumps({"body": line * 20}) + "\n" for line in lines)
    ids = np.arange(200_000, dtype=np.uint16) % 1000
    (folder / "dir").mkdir()
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
        np.save(folder / f"{split}.npy", ids)
        write_bin(folder / "dir" / f"some_{split}_000.bin", ids)
    words = ["tokenize", folder / "my_notes", "--out", folder / "shards", "--tokenizer", "bytes"]
    assert not prepare_data.main([*map(str, words), "--val-percent", "10", "--workers", "1"])
    return folder


@every_page
def test_commands_could_run_as_printed(page, yours, monkeypatch, capsys):
    monkeypatch.chdir(yours)
    failed = []
    for command in commands(page):
        try:
            take(command)
        except WRONG as error:
            failed.append(f"{command}\n    {error} {capsys.readouterr().err.strip()[-300:]}")
    capsys.readouterr()
    assert not failed, f"{len(failed)} failed\n" + "\n".join(failed)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_of_the_makefile_could_run(target, yours, monkeypatch, capsys):
    monkeypatch.chdir(yours)
    for command in recipe(target):
        take(command)


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_snippets_of_python_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for table in ("NORMS", "MANIFOLDS", "FINISHES"):  # which a page adds to
        real = getattr(__import__("geon.optim", fromlist=[table]), table)
        monkeypatch.setattr(f"geon.optim.{table}", real)
        for name in real:
            monkeypatch.setitem(real, name, real[name])
    space = dict(vars(toys))
    exec(block.given, space)  # noqa: S102
    exec(compile(block.text, str(block), "exec"), space)  # noqa: S102
    if "optimizer" in space and "model" in space:
        step(space["model"], space["optimizer"])


def step(model, optimizer):
    """A step of what a snippet made moves every weight and leaves it finite."""
    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = toys.torch.randn_like(param)
    optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.isfinite().all()
        assert not param.equal(old)


@every_page
def test_blocks_say_what_they_are(page):
    for block in blocks(page):
        assert block.kind in KINDS, f"{block}: is it bash, python or text?"
        assert set(block.needs) <= NEEDS, block
    assert not loose(page)


# The programs of a page on this machine: train.py makes two small steps, make and pip do nothing.
RUNNING = """
set -e
make() {{ :; }}
pip() {{ :; }}
pytest() {{ :; }}
python() {{
    {python} "${{@/#train.py/{root}/tests/docs/small.py}}"
}}
torchrun() {{ {python} -m torch.distributed.run "${{@/#train.py/{root}/tests/docs/small.py}}"; }}
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_run(page, yours, tmp_path):
    """All blocks of a page that can run here, one after the other, in one folder."""
    shutil.copytree(yours, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "docs" / "results")
    script = "".join(block.text for block in SCRIPTS if block.page == page)
    if not script:
        pytest.skip("nothing to run")
    words = {"python": shlex.quote(sys.executable), "root": ROOT}
    subprocess.run(
        ["/bin/bash", "--norc", "-c", RUNNING.format(**words) + script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=1500,
    )
