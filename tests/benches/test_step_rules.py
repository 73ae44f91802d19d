"""Rules side by side: what is stepped, and what a row holds."""

import json
import sys
import time

import pytest
import torch

from geon.benches import count_operators
from geon.benches import step as bench_step
from geon.benches import step_rules as bench_step_rules
from geon.benches.step_rules import Matrices, ours
from geon.optim import build

RULES = [
    "muon", "hybrid", "hybrid_two_rules", "normuon", "manifold_muon", "oneshot", "torch",
]  # fmt: skip


def measured(tmp_path, *options):
    out = tmp_path / "out.json"
    assert bench_step.main(["--repeats", "1", "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_rows_of_every_rule_and_shape(tmp_path, capsys):
    found = measured(tmp_path, "--shapes", "32x1,16x2")
    assert set(found) == {"rows", "meta"}
    assert set(found["meta"]) == {"hardware", "versions", "command", "date"}
    assert str(tmp_path) not in found["meta"]["command"]
    keys = {"rule", "width", "layers", "milliseconds", "host_milliseconds", "kernels"}
    assert all(set(row) == keys for row in found["rows"])
    said = [(row["width"], row["layers"], row["rule"]) for row in found["rows"]]
    assert said == [(w, n, rule) for w, n in ((32, 1), (16, 2)) for rule in RULES]
    assert all(row["milliseconds"] >= row["host_milliseconds"] > 0 for row in found["rows"])
    counts = {row["rule"]: row["kernels"] for row in found["rows"] if row["width"] == 16}
    # torch goes matrix by matrix: 12 of them, 5 iterations of 3 products each, and more.
    assert counts["torch"] > 12 * 15 > counts["muon"]
    assert capsys.readouterr().out.count("torch ") == 2


def test_rules_are_those_of_the_recipes():
    """Held against `build`, which reads the roles and the recipe on its own."""
    matrices = Matrices(32, 1, "cpu")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, param in matrices.params().items():
                self.register_parameter(name.replace(".", "_"), param)

        def roles(self):
            return [
                type(info)(**{**vars(info), "name": info.name.replace(".", "_")})
                for info in matrices.infos
            ]

    for rule, recipe in (("muon", "muon"), ("hybrid", "hybrid"), ("normuon", "normuon")):
        wanted = build(Model(), recipe, verbose=False).rules["hidden"]
        assert ours(rule, matrices).rules == {"hidden": wanted}
    two = ours("hybrid_two_rules", matrices)
    heads = {group["name"]: group["param_names"] for group in two.param_groups}
    assert heads["qk"] == [f"blocks.0.attention.proj_in.{part}.weight" for part in "qk"]
    assert len(heads["hidden"]) == 4
    assert two.rules["qk"].manifold.__class__.__name__ == "DGram"
    assert ours("oneshot", matrices).rules["hidden"].ladder.method == "oneshot"
    assert ours("manifold_muon", matrices).rules["hidden"].ladder.method == "lgm"


@pytest.fixture
def checkout(tmp_path):
    def make(source):
        (tmp_path / "checkout" / "dion").mkdir(parents=True)
        (tmp_path / "checkout" / "dion" / "__init__.py").write_text(source)
        return str(tmp_path / "checkout")

    yield make
    sys.modules.pop("dion", None)


def test_dion_is_imported_from_outside_by_what_its_signature_takes(tmp_path, checkout, capsys):
    path = checkout(
        "import torch\n"
        "class Muon(torch.optim.SGD):\n"
        "    def __init__(self, params, distributed_mesh=None, lr=1.0, *, use_triton=True):\n"
        "        assert (lr, use_triton) == (0.02, False)\n"
        "        super().__init__(params, lr=lr)\n"
    )
    found = measured(tmp_path, "--shapes", "16x1", "--dion", path)
    assert [row["rule"] for row in found["rows"]] == [*RULES, "dion"]
    assert path not in sys.path and path not in found["meta"]["command"]
    line = next(line for line in capsys.readouterr().out.splitlines() if " torch " in line)
    assert "-" not in line  # a ratio over dion


def test_a_broken_dion_is_one_line_and_the_others_go_on(tmp_path, checkout, capsys):
    path = checkout("import no_such_kernels\n")
    found = measured(tmp_path, "--shapes", "16x1", "--dion", path)
    assert [row["rule"] for row in found["rows"]] == RULES
    assert "dion: left out, ModuleNotFoundError: No module named" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shapes", "768"], "--shapes '768'"),
        (["--shapes", "0x2"], "--shapes '0x2'"),
        (["--shapes", "16x1", "--drift", "9"], "--drift"),
        (["--dion", "."], "--dion goes with --shapes"),
        (["--shapes", "16x1", "--dion", "."], "dion/__init__.py"),
    ],
)
def test_bad_options_are_told_in_one_line(options, told, capsys):
    assert bench_step.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("geon: error: ") and told in error and error.count("\n") == 1


class Napping:
    def step(self):
        time.sleep(0.02)


def test_a_step_is_timed_until_it_returns_and_by_events_of_the_device(monkeypatch):
    host, whole = count_operators.once(Napping(), cuda=False)
    assert host == whole >= 20.0
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            return 30.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("idle"))
    host, whole = count_operators.once(Napping(), cuda=True)
    assert host >= 20.0 and whole == 30.0
    assert order == ["idle", "record", "record", "wait"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_step_on_a_gpu():
    (width, layers), device = (256, 2), "cuda"
    optimizer = ours("muon", Matrices(width, layers, device))
    for _ in range(2):
        optimizer.step()
    # Five iterations of three products of each of two shapes, and no more than a few an operator.
    assert count_operators.kernels(optimizer) > 30
    assert count_operators.kernels(optimizer) < 10 * count_operators.operators(optimizer).total()
    rows = bench_step_rules.measure(width, layers, 3, device, None)
    assert all(row["kernels"] > 0 and row["milliseconds"] > 0 for row in rows)
