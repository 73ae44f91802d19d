"""What a command of the documents would do, up to the point where it would do it."""

import argparse
import importlib
import re
import subprocess
import sys
import tomllib
from contextlib import contextmanager

from geon.configs.schema import Mode
from geon.engine.checks import absent, check, count_ids
from geon.launch.arguments import read_arguments
from geon.launch.compose import compose, jobs
from tests.docs.blocks import ROOT, split

FACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = re.findall(r"^([a-z-]+):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
MARKS = {re.match(r"\w+", mark)[0] for mark in FACTS["tool"]["pytest"]["ini_options"]["markers"]}
TORCHRUN = {"--standalone": 0, "--signals-to-handle": 1, "--max-restarts": 1, "--nproc_per_node": 1}
TORCHRUN |= {"--nnodes": 1, "--rdzv_backend": 1, "--rdzv_endpoint": 1, "--rdzv_id": 1}
STUDIED = ("--sweep",)
"""Flags whose value is a name in configs/sweep."""


class Parsed(BaseException):
    """Raised where a parser has read the command line, in place of what it was read for."""

    def __init__(self, told):
        self.told = told


@contextmanager
def no_further():
    """Let every parser read its words, and stop there."""
    depth = 0
    kept = {}

    def stopping(name):
        real = kept[name] = getattr(argparse.ArgumentParser, name)

        def act(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                told = real(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth:
                return told
            raise Parsed(told)

        setattr(argparse.ArgumentParser, name, act)

    names = ["parse_args", "parse_known_args", "parse_intermixed_args"]
    for name in [*names, "parse_known_intermixed_args"]:
        stopping(name)
    argv = sys.argv
    try:
        yield
    finally:
        sys.argv = argv
        for name, real in kept.items():
            setattr(argparse.ArgumentParser, name, real)


def take(command):
    """Check a command.

    Raises:
        AssertionError, UsageError, SystemExit: it could not run.
    """
    program, *words = command.words
    reader = READERS.get(program)
    assert reader, f"no reader for {program!r}: add one to READERS in tests/docs/commands.py"
    reader(words, command)


def python(words, command, world=1):
    first, *rest = words
    if words[:2] == ["-m", "pytest"]:
        pytest(rest[1:], command)
    elif words[:2] == ["-m", "pip"]:
        pip(rest[1:], command)
    elif words[:2] == ["-m", "geon"]:
        geon(rest[1:], command)
    elif first == "-m" and rest[0] != "mypy":
        module(rest[0], rest[1:])
    elif first == "train.py":
        train(rest, world, command.needs)
    else:
        assert (ROOT / first).is_file(), f"no file {first}"
        module("geon." + first.removesuffix(".py").replace("/", "."), rest)


def geon(words, command):
    """The command of an installed package."""
    name, rest = importlib.import_module("geon.__main__").module_of(list(words))
    if name == "geon.train":
        train(rest, 1, command.needs)
    else:
        module(name, rest)


def torchrun(words, command):
    world, words = 1, list(words)
    while words[0].startswith("--"):
        flag, _, value = words.pop(0).partition("=")
        assert flag in TORCHRUN, f"torchrun {flag}: is it one?"
        value = value or (words.pop(0) if TORCHRUN[flag] else "")
        if flag in ("--nproc_per_node", "--nnodes"):
            world *= int(value)
    python(words, command, world)


def deepspeed(words, command):
    python(words, command)


def train(words, world, needs=()):
    """Compose, and hold against data, ranks and model, as mode=plan does."""
    told = read_arguments(words)
    if told.prints:
        compose(told.overrides, folder=told.folder)
        return
    each = [told.overrides]
    if told.multirun:
        each = [overrides for _, overrides in jobs(told.overrides, told.folder)]
    for overrides in each:
        config = compose(overrides, "train", told.folder)
        ranks = config.plan.world_size or world
        config.mode = Mode.plan  # so that a device which is not here may be planned for
        if {"network", "files"} & set(needs):
            continue
        corpus = count_ids(config)
        check(config, ranks, corpus=corpus or absent(config))


def module(name, words):
    assert name.startswith(("geon.", "tests.")), f"whose is {name}?"
    found = importlib.import_module(name)
    if not hasattr(found, "main"):
        assert not words
        return
    with no_further():
        sys.argv = [name, *words]
        takes = found.main.__code__.co_argcount
        try:
            found.main(words) if takes else found.main()
        except Parsed as stop:
            told = stop.told
        else:
            raise AssertionError(f"{name} read no words")
    _, _, short = name.rpartition(".")
    check_overrides(short, told[0] if isinstance(told, tuple) else told)


def check_overrides(name, told):
    """Compose the overrides that a program passes on to train.py."""
    words = [word for word in getattr(told, "overrides", ()) if "=" in word]
    if name == "compare" and told.overrides:
        words.insert(0, f"sweep={told.overrides[0]}")
    elif getattr(told, "sweep", None):
        words.insert(0, f"sweep={told.sweep}")
    if words:
        compose(words, name if name in ("sweep", "slurm") else "")


def make(words, command):
    words = list(words)
    while words and words[0] == "-o":
        del words[:2]
    given = [word.partition("=")[0] for word in words if "=" in word]
    targets = [word for word in words if "=" not in word]
    text = (ROOT / "Makefile").read_text()
    for target in targets:
        assert target in TARGETS, f"make {target}: there is {', '.join(TARGETS)}"
    for variable in given:
        assert f"$({variable})" in text, f"make: no target reads {variable}"


def recipe(target, *settings):
    """Commands that a target of the Makefile runs, but for those that install."""
    made = [f".venv/{name}" for name in ("run", "dev", "data", "baselines")]
    keep = [word for name in made for word in ("-o", name)]
    shown = subprocess.run(
        ["make", "-ns", *keep, target, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return split(shown.stdout, f"make {target}")


def pip(words, command):
    if words[0] == "download":
        return
    assert words[0] == "install", words
    for extras in re.findall(r"(?:\.|geon)\[(.*?)\]", " ".join(words)):
        known = FACTS["project"]["optional-dependencies"]
        assert set(extras.split(",")) <= set(known), f"pip: extras are {', '.join(known)}"


def pytest(words, command):
    for flag, value in zip(words, words[1:], strict=False):
        if flag == "-m":
            assert set(re.findall(r"\w+", value)) - {"not", "or", "and"} <= MARKS
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), f"pytest: no {word}"


def anything(words, command):
    """Belong to others."""


READERS = {
    "python": python,
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "geon": geon,
    "make": make,
    "pip": pip,
    "pytest": pytest,
    **dict.fromkeys(("accelerate", "git", "pre-commit", "unzip"), anything),
    **dict.fromkeys(("awk", "grep", "ln", "mkdir", "mypy", "rm", "ruff"), anything),
}
