"""Runs in stretches: killed, resumed, on other ranks; each token counts once, each bit is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from geon.data import write_bin
from geon.engine import checkpoint
from geon.launch import local
from tests.distributed.jobs import TINY, metrics, train

pytestmark = [pytest.mark.dist, pytest.mark.slow]

JOB = Path(__file__).parent / "stretch_job.py"


def stretch(folder, name, ranks, *options, dies=0, ok=None):
    """One stretch of a run, which dies of a step, or ends well."""
    arguments = [str(folder / f"{name}.notes"), str(dies), *TINY, f"output={folder}"]
    arguments += [f"name={name}", *options]
    command = [sys.executable, str(JOB), *arguments]
    if ranks > 1:
        command = local.torchrun_command(ranks, arguments, JOB)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(local.ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    good = not dies if ok is None else ok
    assert (done.returncode == 0) is good, done.stdout[-2000:] + done.stderr[-4000:]
    return done


CONTEXT, SEQUENCES, STEPS = 32, 8, 20


@pytest.mark.row("R18")
def test_each_token_counts_once_over_kills_and_other_ranks(tmp_path):
    """Counting tokens tell which window a step read; the run is one epoch long."""
    windows = SEQUENCES * STEPS
    write_bin(tmp_path / "train.bin", np.arange(windows * CONTEXT + 1))
    write_bin(tmp_path / "val.bin", np.arange(2000))
    options = [
        "data=bins",
        f"data.train={tmp_path}/train.bin",
        f"data.val={tmp_path}/val.bin",
        f"data.vocab_size={windows * CONTEXT + 1}",
        "data.tokens=0",
        "data.shuffle=true",
        f"data.batch_tokens={SEQUENCES * CONTEXT}",
        f"model.context={CONTEXT}",
        "model.n_layer=1",
        f"schedule.steps={STEPS}",
        "checkpoint.every=5",
    ]
    for ranks, dies in ((2, 7), (1, 13), (4, 17), (1, 0)):
        stretch(tmp_path, "run", ranks, *options, dies=dies)
    taken = {step: [] for step in range(STEPS)}  # the whole batch, each time a step was taken
    parts = {}
    for line in (tmp_path / "run.notes").read_text().splitlines():
        step, rank, world, first = json.loads(line)
        part = parts.setdefault((step, world), {})
        part[rank] = [token // CONTEXT for token in first]
        if len(part) == world:
            taken[step].append([window for one in range(world) for window in part[one]])
            del parts[step, world]
    assert all(times and all(one == times[0] for one in times) for times in taken.values())
    assert sum(len(times) > 1 for times in taken.values()) >= 3  # steps were indeed taken again
    counted = [window for step in range(STEPS) for window in taken[step][-1]]
    assert sorted(counted) == list(range(windows))
    assert counted != sorted(counted)


@pytest.mark.row("R04")
def test_the_loss_is_that_of_one_process_on_any_ranks(tmp_path):
    options = ["parallel.precision=fp32", "schedule.steps=30", "logger.every=1"]
    losses = {}
    for ranks, layout in ((1, "single"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")):
        name = f"{layout}-{ranks}"
        run = train(tmp_path, name, ranks, f"parallel={layout}", *options)
        losses[name] = np.array([row["loss"] for row in metrics(run, "train")])
        assert len(losses[name]) == 30
    alone = losses["single-1"]
    assert alone[0] - alone[-1] > 0.1  # it does train
    apart = {name: float(abs(found - alone).max()) for name, found in losses.items()}
    assert max(apart.values()) <= 1e-5, apart


def tensors(folder):
    """Everything that a run's newest checkpoint holds, by name."""
    reader = dcp.FileSystemReader(checkpoint.find(folder))
    kept = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in reader.read_metadata().state_dict_metadata.items()
        if hasattr(one, "size")
    }
    dcp.load(kept, storage_reader=reader, no_dist=True)
    return kept


@pytest.mark.row("R32")
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_goes_on_after_a_kill_bit_by_bit(tmp_path, stage):
    options = [f"parallel=deepspeed_z{stage}", "optim=normuon", "optim.max_norm=0"]
    options += ["checkpoint.every=5"]
    stretch(tmp_path, "whole", 2, *options)
    stretch(tmp_path, "killed", 2, *options, dies=13)
    root = tmp_path / "killed" / "checkpoints"
    assert checkpoint.committed(root)[-1].name == "step-0000010"
    (root / "latest").unlink(missing_ok=True)  # a word for people; nothing may depend on it
    done = stretch(tmp_path, "killed", 2, *options)
    assert "at step 10" in done.stdout
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert a.keys() == b.keys() and len(a) > 20
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.row("R32")
def test_deepspeed_names_the_file_that_was_cut(tmp_path):
    options = ["parallel=deepspeed_z1", "optim.max_norm=0"]
    folder = train(tmp_path, "run", 2, *options)
    cut = min((folder / "checkpoints" / "step-0000020").glob("*.distcp"))
    os.truncate(cut, cut.stat().st_size // 2)
    asked = [f"checkpoint.resume={cut.parent}", "schedule.steps=25"]
    done = train(tmp_path, "run", 2, *options, *asked, ok=False)
    assert done.returncode != 0
    assert cut.name in done.stderr
