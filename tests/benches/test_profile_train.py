"""Profiles of training steps: the trace is one, the table counts what ran."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from geon.benches import count_operators, profile_train
from tests.launch.jobs import SMALLEST

TINY = [*(word for word in SMALLEST if not word.startswith("schedule")), "parallel=single"]


def test_traces_and_tables(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    options = ["optim=muon", "--steps", "2", "--rows", "4", "--trace", str(trace)]
    assert profile_train.main([*TINY, *options]) == 0
    names = [
        {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
        for path in (trace, trace.with_suffix(".optimizer.json"))
    ]
    assert "aten::embedding" in names[0] and "aten::embedding" not in names[1]
    assert all("Optimizer.step#HybridOptimizer.step" in own for own in names)
    first, second = capsys.readouterr().out.split("optimizer step, operators")
    assert first.startswith("training step, operators")
    assert all(part.count(" ms ") == 5 for part in (first, second))  # a head and four rows
    assert "aten::baddbmm" in second


def test_rows_are_self_times_of_one_step():
    a = torch.randn(200, 200)

    def work():
        with torch.profiler.record_function("named range"):
            (a @ a) @ a

    found = profile_train.profiled(work, 3, torch.device("cpu"))
    rows = profile_train.rows(found.key_averages(), 3, kernels=False)
    by = {row["name"]: row for row in rows}
    assert rows[0]["name"] == "aten::mm" and rows[0]["calls"] == 2
    assert "named range" not in by
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    total = sum(event.self_cpu_time_total for event in found.events() if event.name == "aten::mm")
    assert rows[0]["milliseconds"] == pytest.approx(total / 3e3)
    assert not profile_train.rows(found.key_averages(), 3, kernels=True)


def seen(key, device, host=0.0, spent=0.0, named=False):
    return SimpleNamespace(
        key=key,
        device_type=device,
        is_user_annotation=named,
        self_cpu_time_total=host,
        self_device_time_total=spent,
        count=4,
    )


def test_on_a_gpu_kernels_are_neither_copies_nor_ranges_nor_operators():
    averages = [
        seen("aten::mm", DeviceType.CPU, host=8.0, spent=3000.0),
        seen("gemm", DeviceType.CUDA, spent=3000.0),
        seen("triton_add", DeviceType.CUDA, spent=1000.0),
        seen("Memcpy DtoD (Device -> Device)", DeviceType.CUDA, spent=7.0),
        seen("Memset (Device)", DeviceType.CUDA, spent=7.0),
        seen("Optimizer.step#HybridOptimizer.step", DeviceType.CUDA, spent=9000.0, named=True),
    ]
    assert [count_operators.is_kernel(one) for one in averages] == [False, True, True] + [False] * 3
    kernels = profile_train.rows(averages, 2, kernels=True)
    assert [(row["name"], row["calls"], row["milliseconds"]) for row in kernels] == [
        ("gemm", 2, 1.5),
        ("triton_add", 2, 0.5),
    ]
    assert [row["share"] for row in kernels] == [0.75, 0.25]
    operators = profile_train.rows(averages, 2, kernels=False)
    assert [(row["name"], row["milliseconds"]) for row in operators] == [("aten::mm", 0.004)]


@pytest.mark.parametrize(
    ("options", "told"),
    [(["--trace", "no/such/t.json"], "--trace"), (["eval=x"], "eval")],
)
def test_bad_input_is_one_message(options, told, capsys):
    assert profile_train.main([*TINY, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("geon: error: ") and told in error and error.count("\n") == 1


def test_a_number_of_rows_has_a_range(capsys):
    with pytest.raises(SystemExit, match="2"):
        profile_train.main([*TINY, "--rows", "0"])
    assert "--rows: 0 is not between 1" in capsys.readouterr().err
