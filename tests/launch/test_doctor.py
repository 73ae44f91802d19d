import json
import os
import subprocess
import sys

import pytest

from geon.launch.local import ROOT
from geon.scripts import doctor


def run_doctor(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "geon.scripts.doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_versions_are_read_without_importing():
    assert doctor.version("numpy")
    assert doctor.version("no-such-package-of-this-name") is None
    code = "import sys, geon.scripts.doctor as d; d.version('transformers'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "hydra"} & set(loaded)


def test_every_extra_exists():
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for package, (_, extra) in doctor.OPTIONAL.items():
        wanted = [line.split(">")[0].split("=")[0] for line in extras[extra]]
        assert package in wanted


def test_missing_names_feature_and_remedy():
    facts = {
        "required": {"torch": "2.13"},
        "optional": {"wandb": None, "tensorboard": "2.0"},
        "compiler": None,
        "gpus": [{}],
        "collectives": {"gloo": {"ok": False, "error": "no address"}},
    }
    rows = {row["what"]: (row["feature"], row["how"]) for row in doctor.missing(facts)}
    assert rows["wandb"] == ("logger=wandb", "pip install -e '.[wandb]'")
    assert "parallel.compile" in rows["C++ compiler"][0]
    assert "GLOO_SOCKET_IFNAME" in rows["working gloo"][1]
    assert set(rows) == {"wandb", "C++ compiler", "working gloo"}


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert doctor.free_disk(tmp_path / "a" / "b") == pytest.approx(
        doctor.free_disk(tmp_path), rel=0.1
    )


def test_broken_torch_is_told_and_fails(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is not there')\n")
    ran = run_doctor(PYTHONPATH=str(tmp_path))
    assert ran.returncode == 1
    assert "libtorch is not there" in ran.stdout
    assert not ran.stderr


@pytest.mark.dist
def test_a_healthy_machine():
    ran = run_doctor("--json")
    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout)
    assert facts["collectives"]["gloo"]["ok"]
    assert facts["collectives"]["gloo"]["milliseconds"] > 0
    assert all(rate > 0 for rate in facts["matmul_gflops"]["cpu"].values())
    assert facts["required"]["torch"].startswith("2.")
    page = doctor.render(facts)
    assert page.index("versions") < page.index("machine") < page.index("\nmissing\n")


@pytest.mark.dist
def test_a_collective_that_does_not_answer_is_ended():
    assert doctor.collective("gloo", seconds=0.01) == {"ok": False, "error": "no answer in 0 s"}


@pytest.mark.dist
def test_a_collective_that_fails_gives_the_reason():
    result = doctor.collective("no_such_backend")
    assert not result["ok"]
    assert "no_such_backend" in result["error"].lower()
