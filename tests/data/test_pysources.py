"""Which Python files of a machine are text to train on: each once."""

import hashlib
import json

import numpy as np

from geon.data import pysources
from geon.data.bpe import BPECodec
from geon.data.meta import read_meta
from geon.scripts import prepare_pysources


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


def test_shards_hold_every_file_once_behind_a_separator(tmp_path, monkeypatch):
    texts = {f"{i}.py": f"x_{i} = 'é{i}'\n" * 20 for i in range(300)}
    tree(tmp_path / "lib", texts)
    monkeypatch.setattr(prepare_pysources, "roots", lambda: [tmp_path / "lib"])
    monkeypatch.setattr(prepare_pysources, "SHARD", 3000)
    monkeypatch.setattr(prepare_pysources, "AT_A_TIME", 40)
    out = tmp_path / "out"
    prepare_pysources.prepare(out, vocab=512)
    meta = read_meta(out)
    codec = BPECodec((out / "tokenizer.json").read_text("utf-8"))
    assert (meta.vocab_size, codec.decode([meta.eot])) == (512, b"\0")
    told = {}
    for name, part in meta.splits.items():
        ids = [np.fromfile(out / s.file, "<u2")[512:] for s in part.shards]
        assert [len(one) for one in ids] == [s.tokens for s in part.shards]
        text = codec.decode(np.concatenate(ids).tolist())
        assert part.bytes == len(text)
        told[name] = text.decode("utf-8").split("\0")[1:]
        assert part.documents == len(told[name])
    assert len(meta.splits["train"].shards) > 1
    assert 1 <= len(told["val"]) <= 15  # 2% of 300
    assert sorted(told["train"] + told["val"]) == sorted(texts.values())
    before = (out / "meta.json").read_bytes()
    (tmp_path / "lib" / "0.py").write_text("other")
    prepare_pysources.prepare(out, vocab=512)  # what is there is kept
    assert (out / "meta.json").read_bytes() == before
    sources = pysources.find_sources([tmp_path / "lib"])
    sizes = np.cumsum([path.stat().st_size for path in sources.files])
    some = prepare_pysources.split(sources, most=1000)
    assert sum(map(len, some.values())) == 1 + int((sizes < 1000).sum())
