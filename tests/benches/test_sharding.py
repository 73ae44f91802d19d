"""The bench on two ranks: what is counted is what was planned, and the rows hold what they say."""

import json

import pytest

from geon.launch.local import ROOT, torchrun_command
from tests.distributed.jobs import launch, needs_gpu_ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu_ranks(2)])],
)
def test_counted_bytes_are_the_planned_ones(tmp_path, device):
    out = tmp_path / "out.json"
    options = ["--layers", "1", "--width", "32", "--repeats", "1", "--json", str(out), "--no-torch"]
    options += ["--device", device]
    layouts = ["--layouts", "fsdp", "deepspeed_z1"]
    program = ROOT / "benches" / "sharding.py"
    done = launch(torchrun_command(2, [*options, *layouts], program), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(out.read_text())
    assert content["world_size"] == 2
    assert content["hardware"]["torch"]
    rows = content["rows"]
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        case = f"{row['rule']} {row['layout']} {row['transport']}"
        assert row["bytes_per_rank"] == pytest.approx(row["predicted_bytes"], rel=1e-6), case
        assert row["words_per_rank"] * 4 == pytest.approx(row["bytes_per_rank"]), case
        assert row["collectives_per_bucket"] <= 2, case
        assert row["collectives"] <= 2 * row["buckets"], case
        assert row["seconds"] > 0, case
        assert row["max_rel_error"] <= (1e-3 if row["transport"] in ("gram", "auto") else 1e-5), (
            case
        )
        if row["transport"] == "gram" and row["layout"] == "fsdp":
            assert row["bytes_per_rank"] > 0, case


def test_torch_muon_is_counted_too(tmp_path):
    out = tmp_path / "out.json"
    options = ["--layers", "1", "--width", "32", "--layouts", "fsdp", "--transports", "owner"]
    program = ROOT / "benches" / "sharding.py"
    more = ["--repeats", "1", "--no-errors", "--json", str(out)]
    done = launch(torchrun_command(2, [*options, *more], program), timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["transport"]: row for row in json.loads(out.read_text())["rows"]}
    torch_row = rows["torch.optim.Muon"]
    assert torch_row["collectives"] > 50 > rows["owner"]["collectives"]
    assert torch_row["bytes_per_rank"] > rows["owner"]["bytes_per_rank"]
