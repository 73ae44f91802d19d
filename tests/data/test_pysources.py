"""Which Python files of a machine are text to train on: each once."""

import hashlib
import json

from geon.data import pysources
from geon.scripts.prepare_pysources import write_jsonl


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_every_content_and_every_place_counts_once(tmp_path):
    tree(
        tmp_path / "lib",
        {
            "os.py": "one",
            "test/test_os.py": "two",
            "again.py": "one",  # byte by byte
            "notes.txt": "no",
            ".hidden/x.py": "no",
            "bad.py": b"\xff\xfe\xff",
            "empty/__init__.py": "\n",
            "site-packages/pkg/a.py": "three",
            "site-packages/pkg/_vendor/dep/b.py": "four, vendored",
            "site-packages/dep/b.py": "four",  # the same file in another version
        },
    )
    tree(tmp_path / "venv", {"site-packages/pkg/a.py": "three, newer", "site-packages/c.py": "5"})
    roots = [tmp_path / "lib", tmp_path / "lib" / "site-packages", tmp_path / "venv"]
    found = pysources.find_sources(roots)
    texts = [path.read_text() for path in found.files]
    assert sorted(texts) == ["5", "four", "one", "three", "two"]
    assert texts == sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    assert (found.found, found.copies, found.unread) == (10, 3, 2)
    assert found.bytes == sum(map(len, texts))


def test_the_roots_hold_the_standard_library_and_packages():
    from pathlib import Path

    import torch

    roots = pysources.roots()
    assert any(Path(json.__file__).resolve().is_relative_to(root) for root in roots)
    assert any(Path(torch.__file__).resolve().is_relative_to(root) for root in roots)


def test_files_are_lines_until_there_is_enough(tmp_path):
    tree(tmp_path / "lib", {f"{i}.py": f"x = 'é{i}'\n" * 10 for i in range(5)})
    sources = pysources.find_sources([tmp_path / "lib"])
    size = len((tmp_path / "lib" / "0.py").read_bytes())
    assert write_jsonl(tmp_path / "some.jsonl", sources, most=size + 1) == 2
    lines = (tmp_path / "some.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [
        path.read_text("utf-8") for path in sources.files[:2]
    ]
    assert write_jsonl(tmp_path / "all.jsonl", sources) == 5
