import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest

from geon.launch.local import ROOT
from tests.launch.jobs import SMALLEST
from tests.test_house import FOLDERS

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = {"hydra-core": "hydra", "pytorch-optimizer": "pytorch_optimizer"}
TOLD = [*SMALLEST, "parallel=single", "optim=muon", "seed=3"]
BLOCK = """
from importlib.machinery import PathFinder
find, hidden = PathFinder.find_spec, ("numpy", "hydra", "omegaconf", "yaml", "tqdm", "matplotlib")
PathFinder.find_spec = classmethod(
    lambda cls, name, *more: None if name.split(".")[0] in hidden else find(name, *more)
)
"""


def python(*words, cwd=ROOT, path=ROOT, timeout=120):
    """Run the interpreter with nothing but `path` to find geon by."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def names(lines):
    return [re.match(r"[\w-]+", line)[0] for line in lines]


def test_the_package_itself_costs_torch_alone():
    assert names(EXTRAS["dependencies"]) == ["torch"]


def test_every_extra_brings_what_code_imports():
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py")]
    code = "\n".join(f.read_text("utf-8") for f in files if f.name != "doctor.py")
    for extra, lines in EXTRAS["optional-dependencies"].items():
        for name in set(names(lines)) - {"geon"} if extra != "dev" else ():
            module = MODULES.get(name, name)
            used = rf"^\s*(from|import) ([\w.]+\.)?{module}\b|Origin\(\"{module}\""
            assert re.search(used, code, re.M), f"nothing imports {name} of [{extra}]"


def test_optim_and_models_import_with_torch_alone():
    code = f"{BLOCK}\nimport geon.optim as o, geon.models as m; o.build; print(len(vars(m)))"
    done = python("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_recipe_by_name_says_what_it_needs():
    code = f"{BLOCK}\nfrom geon.configs.recipes import read; read('muon')"
    done = python("-W", "ignore", "-c", code)
    assert "recipe 'muon' is a yaml file" in done.stderr.splitlines()[-1]
    assert "pip install 'geon[train]'" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["train.py", "optim=muon"],
        ["-m", "geon", "sweep", "sweep=lr"],
        ["-m", "geon.launch.slurm", "cluster=slurm"],
        ["-m", "geon.scripts.generate", "runs/x"],
        ["-m", "geon.studies.transfer"],
    ],
)
def test_without_the_extra_every_command_ends_in_one_line(tmp_path, words):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    done = python("-W", "ignore", *words, path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("geon: error: ") and line.endswith("pip install 'geon[train]'")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["swep", "sweep=lr"], "no command 'swep'. Did you mean 'sweep'?"),
        (["optim=no_such_recipe"], "no_such_recipe"),
    ],
)
def test_a_word_that_is_no_command_is_one_line(words, said):
    done = python("-m", "geon", *words)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("geon: error: ") and said in line


def setuptools_builds():
    try:
        return int(metadata.version("setuptools").split(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel's content, from a copy of what it is made of: a build leaves files behind."""
    if not setuptools_builds():
        pytest.skip("needs setuptools 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("geon", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out]
    done = python("-m", "pip", "wheel", source, *options, cwd=out, path="", timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("geon-*.whl")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_holds_the_package_and_nothing_else(unpacked):
    kinds = ("*.py", "*.yaml", "published/*.json", "py.typed")
    wanted = {
        f"{folder}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder in FOLDERS
        for kind in kinds
        for file in (ROOT / folder).rglob(kind)
    }
    own = ("__init__.py", "__main__.py", "errors.py", "py.typed", "train.py")
    there = {
        file.relative_to(unpacked / "geon").as_posix()
        for file in (unpacked / "geon").rglob("*")
        if file.is_file()
    }
    assert there == wanted | set(own)
    (info,) = unpacked.glob("geon-*.dist-info")
    assert {path.name for path in unpacked.iterdir()} == {"geon", info.name}
    assert "geon = geon.__main__:main" in (info / "entry_points.txt").read_text()


@pytest.mark.dist
def test_a_wheel_trains_as_a_checkout_does_from_any_folder(unpacked, tmp_path):
    """Folders there that are named like ours shadow nothing; ranks are those of the module."""
    for name in ("optim", "data", "models", "configs", "engine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    done = python("-m", "geon", *TOLD, "name=one", cwd=tmp_path, path=unpacked)
    assert done.returncode == 0, done.stderr
    code = "from geon.launch.local import run; import sys; d = run(2, sys.argv[1:], threads=1)"
    code += "; print(d.args); sys.exit(d.stderr if d.returncode else 0)"
    two = [word for word in TOLD if word != "parallel=single"]
    done = python("-c", code, *two, "parallel=ddp", "name=two", cwd=tmp_path, path=unpacked)
    assert done.returncode == 0, done.stderr
    started = done.stdout.replace(sys.executable, "python")  # which may lie in the checkout
    assert "'-m', 'geon.train'" in started and str(ROOT) not in started
    done = python(ROOT / "train.py", *TOLD, "name=here", cwd=tmp_path, path="")
    assert done.returncode == 0, done.stderr
    one, two, here = (
        json.loads((tmp_path / "runs" / name / "report.json").read_text())["val_nats_per_token"]
        for name in ("one", "two", "here")
    )
    assert one == here
    assert two == pytest.approx(here, rel=1e-4)


def test_a_slurm_file_of_a_wheel_starts_the_module(unpacked, tmp_path):
    code = "from geon.launch import slurm, compose as c; w = ['cluster=slurm', 'name=big']"
    code += "; print(slurm.render(c.compose(w), [w]))"
    done = python("-c", code, cwd=tmp_path, path=unpacked)
    assert f"({sys.executable} -m torch.distributed.run\n" in done.stdout, done.stderr
    assert "words=(name=big)\n" in done.stdout
    assert '    -m geon.train "${words[@]}" &\n' in done.stdout
