"""What the documents tell readers to type: blocks of bash and Python, and commands inside lines.

A block that cannot run on any machine says why in a comment that no reader sees, right above it:
`<!-- needs: gpu, network, hours, cluster or files -->`. A block of Python that uses names of its
page says which: `<!-- given: model = llama() -->`, by the functions of tests/docs/toys.py.
"""

import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KINDS = {"bash", "python", "text"}
NEEDS = {"cluster", "files", "gpu", "hours", "network"}
PROGRAMS = ["accelerate", "deepspeed", "geon", "git", "make", "pip", "pre-commit"]
PROGRAMS += ["pytest", "python", "torchrun", "unzip"]

_FENCE = re.compile(
    r"(?:^<!-- (?P<key>needs|given): (?P<value>[^\n]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# Bash splits the words: every program is "not found", and the handler prints what was to run.
_LISTEN = r"""
PATH=/nowhere
command_not_found_handle() { printf '\2'; printf '%s\0' "$@"; printf '\1'; }
cd() { :; }
source() { :; }
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, its first line, its language, and what the comment above says."""

    page: Path
    line: int
    kind: str
    text: str
    needs: tuple[str, ...] = ()
    given: str = ""

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """Words of one command, as bash splits them."""

    where: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self):
        return f"{self.where}: {' '.join(self.words)}"


@cache
def blocks(page):
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        told = {match["key"]: match["value"]} if match["key"] else {}
        needs = tuple(told.get("needs", "").replace(",", " ").split())
        line = text.count("\n", 0, match.start("indent")) + 1
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(page, line, match["kind"], body, needs, told.get("given", "")))
    return found


def split(script, where, needs=()):
    """Commands of a script, each with variables, loops and line ends resolved by bash."""
    script = script.replace(".venv/bin/", "")
    heard = subprocess.run(
        ["/bin/bash", "--norc", "-c", _LISTEN + script], capture_output=True, text=True, timeout=20
    )
    assert not heard.stderr, f"{where}: bash says {heard.stderr}"
    lines = re.findall("\2(.*?)\1", heard.stdout, re.DOTALL)  # the rest is what echo printed
    return [Command(where, tuple(line.split("\0")[:-1]), needs) for line in lines]


def commands(page):
    """Commands in blocks of bash, then those inside lines; `...` in one leaves it to the reader."""
    found = [
        command
        for block in blocks(page)
        if block.kind == "bash"
        for command in split(block.text, str(block), block.needs)
    ]
    return found + spans(page)


def quoted(page):
    """What stands between backticks in the lines of a page."""
    return [" ".join(s.split()) for s in _SPAN.findall(_FENCE.sub("", page.read_text("utf-8")))]


def spans(page):
    """Commands among what is quoted."""
    found = []
    for words in quoted(page):
        if words.split()[0] in PROGRAMS and " " in words and "..." not in words:
            found += split(words, page.relative_to(ROOT).as_posix())
    return found


def loose(page):
    """Commands that are set off from the text, but in no fence, so no test would run them."""
    prose = _FENCE.sub("", page.read_text("utf-8"))
    start = rf"^ {{4,}}(?:\w+=\S+ )?(?:{'|'.join(PROGRAMS)}) .*$"
    return re.findall(start, prose, re.MULTILINE)
