"""Config keys and options that the documents name inside their lines exist."""

import dataclasses
import re

import pytest

from geon.configs.overrides import groups, kind_of
from geon.configs.schema import Config
from tests.docs.blocks import PAGES, ROOT, quoted

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FIRST = "|".join(field.name for field in dataclasses.fields(Config))
WORD = re.compile(rf"[+~]*((?:{FIRST})(?:[./][a-z_]+)*)(?:=(\S*))?")
FILES = (".json", ".md", ".py", ".safetensors", ".yaml")


def wrong(span, options):
    """Keys and options of a quotation that do not exist."""
    for word in span.replace("'", " ").split():
        match = WORD.fullmatch(word)
        if not match or word.endswith(FILES):
            continue
        key, value = match.groups()
        if key in options:
            named = [name for name in (value or "").strip(",").split("|") if name.isidentifier()]
            yield from (f"{key}={name}" for name in named if name not in options[key])
        elif "." in key and kind_of(key) is None and not (value is None and is_file(key)):
            yield key


def is_file(key):
    """Whether a key is the name of a module: optim.modular."""
    path = ROOT / key.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_keys_and_options_exist(page):
    options = groups()
    assert [one for span in quoted(page) for one in wrong(span, options)] == []


def test_keys_that_do_not_exist_are_found():
    spans = ["optim=moun", "optim=muon|hybrid", "data.val_tokns=0", "data.seed", "+optim.hiden"]
    spans += ["data.val_tokens", "optim.modular", "optim/hybrid.py"]
    found = [one for span in spans for one in wrong(span, groups())]
    assert found == ["optim=moun", "data.val_tokns", "data.seed", "optim.hiden"]
