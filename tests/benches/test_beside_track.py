"""What a CPU can prove of the run beside the track's trainer: watch, layout, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from geon.benches import beside_track as beside
from geon.data import write_bin
from geon.errors import UsageError
from geon.launch.local import ROOT
from geon.models import ModelShape
from geon.models.gpt_track3 import GPTTrack3

FAKE = """
import sys
with open(sys.argv[0]) as f:
    code = f.read()
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

class Own(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, dict(lr=0.5))

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad.sign(), alpha=-0.01)

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.proj = nn.Linear(4, 11)

    def forward(self, inputs, targets):
        return F.cross_entropy(self.proj(self.embed(inputs)), targets, reduction="sum")

trials = int(sys.argv[-1]) if len(sys.argv) > 1 else 1
model = Toy()
model.compile(dynamic=False)
with torch.no_grad():
    model.proj.weight.normal_()
one, two = AdamW(model.embed.parameters(), lr=0.1), Own(list(model.proj.parameters()))
for step in range(1000):
    batch = torch.arange(24).reshape(2, 12) * (step + 3) % 11
    with torch.no_grad():
        model(batch[0], batch[1])
    for micro in batch.split(6, dim=1):
        model(micro[0], micro[1]).backward()
    one.step()
    two.step()
    model.zero_grad(set_to_none=True)
raise RuntimeError("nobody stopped it")
"""


def by_hand(weights, steps):
    """The toy's sums of losses, stepped without a module or an optimizer of torch."""
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    first, second, found = torch.zeros(11, 4), torch.zeros(11, 4), []
    for step in range(steps):
        inputs, targets = torch.arange(24).reshape(2, 12) * (step + 3) % 11
        logits = w["embed.weight"][inputs] @ w["proj.weight"].T + w["proj.bias"]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        found.append(loss.item())
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        with torch.no_grad():
            g = grads["embed.weight"]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            corrected = second / (1 - 0.999 ** (step + 1))
            w["embed.weight"] *= 1 - 0.1 * 0.01
            w["embed.weight"] -= 0.1 * first / (1 - 0.9 ** (step + 1)) / (corrected.sqrt() + 1e-8)
            for name in ("proj.weight", "proj.bias"):
                w[name] -= 0.01 * grads[name].sign()
    return found


def test_a_script_is_watched_without_a_line_of_it_changed(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(FAKE)
    arguments = [str(script), "--steps=3", "--seed=5", f"--out={tmp_path}"]
    subprocess.run(
        [sys.executable, str(ROOT / "benches" / "track_run.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        check=True,
        timeout=120,
    )
    weights = torch.load(tmp_path / "weights.pt")
    assert list(weights) == ["embed.weight", "proj.weight", "proj.bias"]
    assert weights["proj.weight"].std() > 0.7  # what the script drew after it had compiled
    sums = json.loads((tmp_path / "losses.json").read_text())
    assert sums == pytest.approx(by_hand(weights, 3), rel=1e-5)


def shard(path: Path, tokens: int):
    """A shard of zeros; the disk holds none of them."""
    write_bin(path, np.zeros(0, dtype=np.uint16))
    header = bytearray(path.read_bytes())
    header[8:12] = np.int32(tokens).tobytes()
    path.write_bytes(header)
    os.truncate(path, len(header) + 2 * tokens)


def test_shards_are_linked_by_the_names_that_the_script_looks_for(tmp_path):
    data, batch = tmp_path / "data", beside.BATCH
    data.mkdir()
    shard(data / "mine_val_000000.bin", 1000)
    shard(data / "mine_train_000001.bin", 51 * batch + 2)
    shard(data / "mine_train_000002.bin", 1000)
    folder, said = beside.lay_out(data, tmp_path / "work", 50)
    assert {p.name: p.resolve().name for p in folder.iterdir()} == {
        "fineweb_train_000001.bin": "mine_train_000001.bin",
        "fineweb_train_000002.bin": "mine_train_000002.bin",
        "fineweb_val_000000.bin": "mine_train_000001.bin",  # only looked at, never compared
    }
    assert "too short for the track's validation" in said[0]
    with pytest.raises(UsageError, match="--steps 51 needs 27,262,978 in the first shard"):
        beside.lay_out(data, tmp_path / "more", 51)
    (data / "mine_train_000000.bin").write_bytes(b"\0" * 2048)
    with pytest.raises(UsageError, match="is no uint16 shard with a header"):
        beside.lay_out(data, tmp_path / "other", 50)


def test_the_tracks_names_are_those_of_gpt_track3():
    """Names and shapes as its script has them, at two layers of width 16 and 11 ids."""
    theirs = {"embed.weight": (11, 16), "proj.weight": (11, 16), "proj.bias": (11,)}
    theirs |= {f"norm{i}.gains": (16,) for i in (1, 2)}
    for i in range(2):
        block = {f"attn.{name}": (16, 16) for name in ("q", "k", "v", "proj")}
        block |= {"mlp.fc": (64, 16), "mlp.proj": (16, 64)}
        for name, shape in block.items():
            theirs[f"blocks.{i}.{name}.weight"] = shape
            theirs[f"blocks.{i}.{name}.bias"] = shape[:1]
        theirs |= {f"blocks.{i}.norm{j}.gains": (16,) for j in (1, 2)}
    weights = {name: torch.randn(shape) for name, shape in theirs.items()}
    model = GPTTrack3(ModelShape(vocab_size=11, context=8, n_layer=2, n_head=2, d_model=16))
    beside.load_track_weights(model, weights)
    params = dict(model.named_parameters())
    assert torch.equal(params["blocks.1.down.weight"], weights["blocks.1.mlp.proj.weight"])
    assert torch.equal(params["norm_embed.gains"], weights["norm1.gains"])
    assert torch.equal(params["blocks.0.norm1.gains"], weights["blocks.0.norm1.gains"])
    assert torch.equal(params["head.bias"], weights["proj.bias"])
    del weights["norm2.gains"]
    with pytest.raises(UsageError, match="not those of gpt_track3: norm.gains"):
        beside.load_track_weights(model, weights)


def test_one_step_that_is_too_far_apart_fails_the_comparison():
    found = beside.compare([3.0, 2.0, 1.0], [3.005, 1.985, 1.0], within=0.01)
    assert not found["holds"]
    assert (found["worst_step"], found["worst"]) == (2, pytest.approx(0.015))
    assert "| 2 | 2.00000 | 1.98500 | -0.01500 |" in beside.page(found)
    assert beside.compare([3.0], [3.01 - 1e-9], within=0.01)["holds"]
    assert not beside.compare([3.0], [float("nan")], within=0.01)["holds"]


def test_without_cuda_or_the_script_there_is_one_message(tmp_path, monkeypatch, capsys):
    told = ["--track", str(tmp_path), "--data", str(tmp_path)]
    assert beside.main(told) == 2
    assert "holds no records/track_3_optimization/train_gpt_simple.py" in capsys.readouterr().err
    (tmp_path / beside.SCRIPT).parent.mkdir(parents=True)
    (tmp_path / beside.SCRIPT).write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert beside.main(told) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
