import json
import os
import subprocess
import sys

import pytest
import torch

from geon.benches import step as bench_step
from geon.engine.sharding import make_sharding
from geon.launch.compose import compose
from geon.launch.local import ROOT, torchrun_command
from geon.optim import ParamInfo, Role, matrices_of
from geon.optim.shard import Grid, Sharding, make_plan, read_machine
from geon.scripts import doctor, measure
from tests.distributed.jobs import launch


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
    assert rows["wandb"] == ("logger=wandb", "pip install 'geon[wandb]'")
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


@pytest.mark.dist
def test_what_is_measured_is_planned_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "SIDES", {"cpu": (16, 32)})
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    path = tmp_path / "mine.json"
    assert doctor.main(["--measure", str(path), "--device", "cpu"]) == 0
    content = json.loads(path.read_text())
    assert (content["format"], content["ranks"], content["assumed"]) == (1, 2, [])
    assert content["versions"]["torch"].startswith("2.")
    machine = make_sharding(compose([f"shard.machine={path}", "parallel=fsdp"])).machine
    assert [side for side, _ in machine.fp32] == [16, 32]
    assert machine.device == "cpu"
    # Within what any computer of these years does: a wrong unit would be off by a thousand.
    assert 1e7 < machine.bf16x3[0][1] <= machine.bf16x3[1][1] < 1e13
    assert 1e8 < machine.memory < 1e12
    assert 1e-7 < machine.operator < 1e-3
    assert 1e-6 < machine.latency < 0.1
    assert 1e6 < machine.bandwidth < 1e12
    assert "GFLOP/s" in capsys.readouterr().out


def ratios(layers, width):
    """Predicted over measured seconds of steps, the least of each; fails on a busy machine."""
    machine = read_machine(measure.measure(torch.device("cpu")))
    runs = [bench_step.time_steps(layers, width, 1, "cpu")["seconds"] for _ in range(10)]
    found = {name: min(run[name] for run in runs) for name in bench_step.RULES}
    for name, rule in bench_step.RULES.items():
        matrices = []
        for index, shape in enumerate(bench_step.shapes(layers, width)):
            info = ParamInfo(f"w{index}", shape, Role.HIDDEN)
            matrices += matrices_of(info, "g", rule, Grid.whole(shape, 1))
        yield name, make_plan(matrices, Sharding(machine=machine)).seconds / found[name]


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(2, 128), (2, 256)])
def test_a_measured_machine_predicts_steps_within_a_factor_of_one_and_a_half(
    monkeypatch, layers, width
):
    monkeypatch.setattr(measure, "SIDES", {"cpu": (64, 128, 256)})
    monkeypatch.setattr(measure, "_two_ranks", lambda kind: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = dict(ratios(layers, width))
    finally:
        torch.set_num_threads(threads)
    assert all(1 / 1.5 < ratio < 1.5 for ratio in found.values()), found


@pytest.mark.slow
def test_all_ranks_of_a_launcher_are_measured_together(tmp_path):
    path = tmp_path / "mine.json"
    options = ["--measure", str(path), "--device", "cpu"]
    done = launch(torchrun_command(3, options, ROOT / "scripts" / "doctor.py"), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(path.read_text())["ranks"] == 3
    assert done.stdout.count("GFLOP/s") == 3  # one rank prints


def test_a_file_that_could_not_be_read_or_written_is_refused(tmp_path, capsys):
    for path, words in (
        (tmp_path / "a.txt", "must end in .json"),
        (tmp_path / "b" / "c.json", "no folder"),
    ):
        assert doctor.main(["--measure", str(path), "--device", "cpu"]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
    with pytest.raises(SystemExit):
        doctor.main(["--device", "cpu"])
