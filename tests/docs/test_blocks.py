"""What the documents print can be typed: composed, planned or parsed here, and run by `-m slow`."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch

from geon.data.shards import write_bin
from geon.engine import build
from geon.errors import UsageError
from geon.optim import FINISHES, MANIFOLDS, NORMS
from geon.scripts import prepare_data
from tests.docs import toys
from tests.docs.blocks import KINDS, NEEDS, PAGES, ROOT, blocks, commands, loose, split
from tests.docs.commands import TARGETS, recipe, take

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
SCRIPTS = [b for page in PAGES for b in blocks(page) if b.kind == "bash" and not b.needs]
SNIPPETS = [b for page in PAGES for b in blocks(page) if b.kind == "python"]
WRONG = (AssertionError, UsageError, SystemExit, ImportError)


@pytest.fixture(scope="module", autouse=True)
def data_made_once():
    """Read Python's library and draw glyphs once: it is most of what a plan takes."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdlib_corpus", "glyph_corpus"):
            patch.setattr(build, name, cache(getattr(build, name)))
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
    for part in ("train", "val"):
        ids.tofile(folder / f"{part}.bin")
        np.save(folder / f"{part}.npy", ids)
        write_bin(folder / "dir" / f"some_{part}_000.bin", ids)
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
def test_snippets_of_python_run(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    for registry in (NORMS, MANIFOLDS, FINISHES):  # which a page adds to
        before = dict(registry)
        request.addfinalizer(lambda r=registry, b=before: (r.clear(), r.update(b)))
    space = dict(vars(toys))
    exec(block.given, space)
    exec(compile(block.text, str(block), "exec"), space)
    if "optimizer" in space and "model" in space:
        step(space["model"], space["optimizer"])


def step(model, optimizer):
    """A step of what a snippet made moves every weight and leaves it finite."""
    before = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.randn_like(param)
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
source() {{ :; }}
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
    if " RUN" in script:  # the reader's run folder
        script = "python train.py experiment=first_run parallel=single output=. name=RUN\n" + script
    words = {"python": shlex.quote(sys.executable), "root": ROOT}
    subprocess.run(
        ["/bin/bash", "--norc", "-c", RUNNING.format(**words) + script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=1500,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        "python train.py optim=moun",
        "python train.py optim.lrr=0.1 parallel=single",
        "python train.py parallel=single data.batch_tokens=1000",
        "torchrun --standalone --nproc_per_node=3 train.py parallel=ddp",
        "torchrun --standalone --nproc=3 train.py parallel=ddp",
        "python -m geon.scripts.generate runs/x --promt 'def '",
        "python -m geon.scripts.certificate runs/x",
        "python -m geon.studies.leaderboard --sweep nothing",
        "python -m geon.benches.train optim.lrr=1",
        "make dmeo",
        "make demo RNAKS=2",
        "pip install -e '.[dat]'",
        "pytest -m slwo",
        "pytest tests/nothing.py",
        "pyhton train.py",
    ],
)
def test_wrong_commands_are_found(wrong, yours, monkeypatch):
    monkeypatch.chdir(yours)
    (command,) = split(wrong, "here")
    with pytest.raises(WRONG):
        take(command)
