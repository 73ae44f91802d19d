import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.arrows import (
    ALONE,
    ARROWS,
    HEAVY,
    LAZY_ARROWS,
    LAZY_OTHERS,
    ONLY_NAMES,
    OTHERS,
    OTHERS_BY_FILE,
    PARTS,
)

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "optim", "models", "data", "engine", "launch")
USERS = ("scripts", "benches", "studies", "tests")  # import anything; no room imports them
FOLDERS = (*ROOMS, *USERS[:-1])
SOURCES = [
    ROOT / "train.py",
    *(
        file
        for folder in ("geon", *ROOMS, *USERS)
        for file in sorted((ROOT / folder).rglob("*.py"))
    ),
]
PACKAGE = [file for file in SOURCES if file.relative_to(ROOT).parts[0] not in ("tests", "train.py")]


def place(file):
    return file.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Import:
    """One imported module, e.g. geon.optim.norms, and the names taken from it."""

    file: str
    module: str
    names: tuple[str, ...]
    lazy: bool

    def __str__(self):
        return f"{self.file} imports {self.module} {'lazily' if self.lazy else 'at its top'}"


def is_module(dotted):
    path = ROOT.joinpath(*dotted.split(".")[1:])
    return dotted.startswith("geon.") and (
        path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    )


def parse(source, file):
    """Imports of a file; one inside a function or under `if TYPE_CHECKING` is lazy."""
    found = []

    def take(node, lazy):
        match node:
            case ast.Import(names=names):
                found.extend(Import(file, alias.name, (), lazy) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                module = "." * level + (module or "")
                for alias in names:
                    inner = f"{module}.{alias.name}"
                    target = (inner, ()) if is_module(inner) else (module, (alias.name,))
                    found.append(Import(file, *target, lazy))
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                found.append(Import(file, module, (), lazy))
        checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            take(child, lazy or function or checking)

    take(ast.parse(source), False)
    return found


@cache
def imports():
    return tuple(i for file in SOURCES for i in parse(file.read_text("utf-8"), place(file)))


def unit(dotted):
    """optim.norms for geon.optim.norms.sign; those in ALONE are units of their own."""
    name = dotted.removeprefix("geon.")
    for known in sorted({*ARROWS, *PARTS.split(), *ALONE}, reverse=True):
        if name == known or name.startswith(f"{known}."):
            return known
    return name.split(".")[0] if dotted != "geon" else "geon"


def unit_of_file(file):
    if file == "train.py":
        return file
    if file.startswith("geon/"):
        return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    own = unit(f"geon.{dotted}")
    return own.split(".")[0] if own in ALONE else own


def refusal(i):
    """Why this import is not allowed; empty when it is."""
    if i.module.startswith("."):
        return f"{i}: write absolute imports"
    top = i.module.split(".")[0]
    if top in FOLDERS:
        return f"{i}: write geon.{i.module}"
    folder = i.file.split("/")[0]
    if folder in USERS:
        return ""
    own = unit_of_file(i.file)
    if top == "geon":
        aim = unit("geon.errors" if i.module == "geon.errors" else i.module)
        allowed = set(ARROWS.get(own, "").split()) | {own, "errors"}
        allowed |= {"configs": ALONE, "launch": {"launch.env", "launch.signals"}}.get(own, set())
        allowed |= set(LAZY_ARROWS.get(own, "").split()) if i.lazy else set()
        if aim not in allowed:
            return f"{i}: {own} may import {', '.join(sorted(allowed))} of geon"
        names = ONLY_NAMES.get((own, aim))
        return f"{i}: only {names}" if names and not set(i.names) <= names else ""
    if top in sys.stdlib_module_names:
        return ""
    allowed = set(OTHERS.get(folder, "").split()) | set(OTHERS_BY_FILE.get(i.file, "").split())
    allowed |= set(LAZY_OTHERS.get(folder, "").split()) if i.lazy else set()
    return "" if top in allowed else f"{i}: {folder} may import {', '.join(sorted(allowed))}"


def test_every_import_is_an_allowed_arrow():
    assert len(imports()) > 200
    refused = [said for i in imports() if (said := refusal(i))]
    assert not refused, "\n".join(refused)


def test_every_part_of_the_package_has_a_row_in_the_table():
    units = {unit_of_file(place(file)) for file in PACKAGE} - set(USERS)
    assert units <= set(ARROWS), "say in ARROWS what the new part may import"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optim/polar/iterate.py", "from geon.optim.norms import Norm"),
        ("optim/polar/iterate.py", "from geon.optim import norms"),
        ("optim/polar/iterate.py", "from geon.optim import Rule"),
        ("optim/norms/sign.py", "from geon.optim.manifolds.base import Manifold"),
        ("optim/manifolds/stiefel.py", "import geon.optim.norms.sign as s"),
        ("optim/solvers/exact.py", "from geon.optim.rule import Rule"),
        ("optim/rule.py", "from geon.optim.polar import Polar"),
        ("optim/linalg.py", "from geon.optim.polar import polar"),
        ("optim/finishes/even_rows.py", "from geon.optim.rule import Rule"),
        ("optim/shard/transports/gram.py", "from geon.optim.solvers.sums import GramForm"),
        ("optim/hybrid.py", "from geon.optim.baselines import Baseline"),
        ("optim/rule.py", "from geon.optim.shard import Plan"),
        ("optim/shard/plan.py", "from geon.optim.norms import Reach, Norm"),
        ("optim/shard/plan.py", "from geon.optim.roles import ParamInfo"),
        ("optim/hybrid.py", "from geon.models import GPT"),
        ("optim/hybrid.py", "import numpy as np"),
        ("optim/hybrid.py", "def f():\n    import numpy"),
        ("optim/adamw.py", "from geon.configs.recipes import read"),
        ("optim/builder.py", "from geon.configs.schema import Config"),
        ("optim/adamw.py", "from importlib import import_module\nimport_module('deepspeed')"),
        ("models/gpt.py", "from geon.optim import Role"),
        ("models/gpt.py", "from geon.optim.router import route"),
        ("models/gpt.py", "from geon.data import Split"),
        ("models/gpt.py", "import transformers"),
        ("data/order.py", "from geon.optim.roles import Role"),
        ("data/order.py", "import tokenizers"),
        ("data/order.py", "def f():\n    from tokenizers import Tokenizer"),
        ("engine/main.py", "from geon.configs.check import resolve"),
        ("engine/main.py", "from geon.launch.local import run"),
        ("engine/main.py", "import hydra"),
        ("engine/main.py", "import wandb"),
        ("engine/main.py", "from geon import scripts"),
        ("engine/main.py", "from geon.scripts.plot import main"),
        ("engine/main.py", "from . import build"),
        ("launch/local.py", "import torch"),
        ("launch/local.py", "def f():\n    import torch"),
        ("launch/local.py", "import hydra"),
        ("launch/local.py", "from geon.configs.schema import Config"),
        ("launch/local.py", "def f():\n    from geon.engine.main import execute"),
        ("configs/check.py", "from geon.engine.build import make_model"),
        ("configs/schema.py", "import torch"),
        ("geon/errors.py", "import geon.configs.check"),
        ("geon/__init__.py", "import torch"),
        ("train.py", "from geon.scripts import plot"),
        ("train.py", "import optim"),
        ("scripts/plot.py", "from engine.report import draw"),
        ("tests/data/test_order.py", "def f():\n    import data.order"),
        ("tests/data/test_order.py", "from models import gpt"),
    ],
)
def test_the_table_refuses_wrong_arrows(file, source):
    assert any(refusal(i) for i in parse(source, file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optim/solvers/exact.py", "from geon.optim.polar import polar_svd"),
        ("optim/shard/plan.py", "from geon.optim.norms import Reach"),
        ("models/export.py", "def f():\n    import transformers"),
        ("engine/build.py", "from geon.optim import Rule, roles"),
        ("launch/slurm.py", "if TYPE_CHECKING:\n    from geon.configs.schema import Config"),
        ("scripts/plot.py", "import hydra, geon.scripts.doctor, geon.engine.report"),
    ],
)
def test_the_table_lets_right_arrows_through(file, source):
    assert not [said for i in parse(source, file) if (said := refusal(i))]


@pytest.mark.parametrize("module", HEAVY.split())
def test_slow_or_optional_packages_have_one_file_each_that_is_read_lazily(module):
    users = [
        i
        for i in imports()
        if (i.module == module or i.module.startswith(f"{module}."))
        and i.file.split("/")[0] not in USERS
    ]
    files = {i.file for i in users} - {"data/glyphs.py"}  # draws with the fonts, lazily
    assert len(files) <= 1, files
    if any(not i.lazy for i in users):
        (file,) = files
        home = f"geon.{file.removesuffix('.py').replace('/', '.')}"
        eager = [i for i in imports() if i.module == home and not i.lazy]
        assert not [str(i) for i in eager if not i.file.startswith("tests/")]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (
            "geon.optim",
            "hydra omegaconf transformers deepspeed wandb matplotlib geon.models geon.data",
        ),
        ("geon.launch.local, geon.launch.env", "torch numpy hydra omegaconf geon.configs"),
        ("geon.configs.check, geon.configs.schema", "torch numpy geon.engine geon.optim"),
        (
            "geon.engine.main, geon.data, geon.models",
            "transformers deepspeed wandb matplotlib tokenizers datasets tensorboard",
        ),
    ],
)
def test_imports_load_no_more_than_they_need(module, unwanted):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split()) & set(unwanted.split())
    assert not loaded


@cache
def setuptools_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def test_every_package_folder_is_listed_in_pyproject():
    found = {"geon"}
    for file in PACKAGE:
        if file.name == "__init__.py" and file.parent != ROOT / "geon":
            found.add(".".join(["geon", *file.parent.relative_to(ROOT).parts]))
    assert found == set(setuptools_table()["packages"])


def test_pyproject_maps_every_package_to_its_folder():
    folders = setuptools_table()["package-dir"]
    for package in setuptools_table()["packages"]:
        base = max((p for p in folders if f"{package}.".startswith(f"{p}.")), key=len)
        rest = package.removeprefix(base).strip(".").replace(".", "/")
        wanted = ROOT if package == "geon" else ROOT.joinpath(*package.split(".")[1:])
        assert ROOT / folders[base] / rest == (ROOT / "geon" if package == "geon" else wanted)


def test_every_folder_with_modules_is_a_package():
    assert not [f for f in {file.parent for file in PACKAGE} if not (f / "__init__.py").is_file()]


@pytest.mark.parametrize(("file", "most"), [("train.py", 80), ("geon/__init__.py", 15)])
def test_the_entry_files_are_short(file, most):
    assert len((ROOT / file).read_text("utf-8").splitlines()) <= most


def test_no_file_is_longer_than_400_lines():
    lengths = {place(file): len(file.read_text("utf-8").splitlines()) for file in SOURCES}
    assert not {file: length for file, length in lengths.items() if length > 400}


def test_only_launch_reads_the_environment():
    readers = re.compile(r"\bos\.(environ|getenv)|\bfrom os import\b")
    own = [f for f in SOURCES if place(f).split("/")[0] not in ("launch", "tests")]
    assert not [place(f) for f in own if readers.search(f.read_text("utf-8"))]


HOMES = re.compile(r"(?<![\w.~-])/" + r"(work|root|home/\w+|Users/\w+)/")


def test_no_file_holds_a_path_of_somebodys_machine():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the files that belong to the project")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content and HOMES.search(content.decode("utf-8", errors="replace")):
            found.append(name)
    assert not found


def test_the_pattern_for_such_paths_finds_them():
    for folder in ("work", "root", "home/me", "Users/me"):
        assert HOMES.search(f"see '/{folder}/" + "x'")
    assert not HOMES.search("https://example.org/srv/x and ./root/x and a/home/b/c")
