"""Links and anchors of the documents lead somewhere, and every page is reached from the README."""

import re
import string

import pytest

from tests.docs.blocks import PAGES, ROOT

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def links(page):
    """Targets of links and pictures that lie in this repository, as (file, anchor)."""
    prose = _FENCE.sub("", page.read_text("utf-8"))
    for target in _LINK.findall(prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


def anchors(page):
    """Anchors of the headings, by GitHub's rule."""
    prose = _FENCE.sub("", page.read_text("utf-8"))
    gone = str.maketrans("", "", string.punctuation.replace("-", "").replace("_", ""))
    heads = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {head.strip().lower().translate(gone).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_anchors_lead_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    seen, new = set(), {ROOT / "README.md"}
    while new:
        seen |= new
        new = {path for page in new for path, _ in links(page) if path.suffix == ".md"} - seen
    assert set(PAGES) <= seen


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
