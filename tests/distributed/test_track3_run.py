"""gpt_track3 from end to end: saved by FSDP2, gone on with under tensor parallelism and alone."""

import shutil

import pytest

from geon.scripts import generate, prepare_data
from tests.distributed.jobs import distance, train, weights

pytestmark = pytest.mark.dist

# Heads of 32: at step 1 the zero projections give the hybrid's q and k a gradient of zero.
TRACK3 = [
    "model=gpt_track3",
    "model.d_model=64",
    "optim=hybrid",
    "parallel.precision=fp32",
    "data=bins",
    "data.vocab_size=0",
    "data.batch_tokens=512",
    "schedule.steps=4",
    "checkpoint.every=2",
    "checkpoint.keep=5",
]


def test_it_goes_on_in_other_layouts_and_speaks(tmp_path, capsys):
    lines = "".join(f"def number_{i}(x):\n    return x + {i * i}\n" for i in range(2000))
    (tmp_path / "code.txt").write_text(lines)
    shards = tmp_path / "shards"
    command = ["tokenize", str(tmp_path / "code.txt"), "--out", str(shards), "--workers", "1"]
    assert prepare_data.main([*command, "--tokenizer", "train:300", "--val-percent", "10"]) == 0
    options = [*TRACK3, f"data.dir={shards}"]
    whole = train(tmp_path, "fsdp", 2, *options, "parallel=fsdp")
    for name, ranks, layout in (("tp", 2, "tp"), ("single", 1, "single")):
        shutil.copytree(whole, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-0000004")
        run = train(tmp_path, name, ranks, *options, f"parallel={layout}")
        assert distance(weights(whole), weights(run)) <= 1e-4
        capsys.readouterr()
        assert generate.main([str(run), "--prompt", "def ", "--tokens", "9"]) == 0
        assert capsys.readouterr().out.startswith("def ")
