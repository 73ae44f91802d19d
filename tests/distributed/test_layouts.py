"""Every layout on a device gives the weights of one process on real text, and takes over its runs.

On four NCCL ranks, which share a GPU where they must; with gloo and fewer ranks on the CPU, so that
all but the device is proved everywhere.
"""

import shutil

import pytest

from geon.launch.local import ROOT
from tests.distributed.jobs import EXACT, distance, metrics, needs_gpu_ranks, on_device, train
from tests.distributed.jobs import weights as weights_of
from tests.distributed.test_checkpoints import HALF, cut_back

pytestmark = pytest.mark.dist

TEXT = ["data=text", f"data.path={ROOT / 'docs' / 'theory.md'}", "data.vocab_size=256"]
TEXT += ["data.batch_tokens=2048", *EXACT]
LAYOUTS = {
    "ddp": [],
    "fsdp": [],
    "hsdp": ["parallel.replicas=2"],
    "tp": [],
    "fsdp_tp": ["parallel.tensor=2"],
}
# Rounding grows with the rate: at its default of 0.02 Manifold Muon's worst weight is 2e-5 off
# after 20 steps, by another order of sums in the gradients (a CPU, two ranks of fsdp or tp).
OPTIMS = {"hybrid": [], "manifold_muon": ["optim.lr=0.002"]}


def job(folder, name, device, ranks, layout, optim, *more):
    options = [f"parallel={layout}", f"optim={optim}", *OPTIMS[optim], *TEXT]
    options += [*on_device(device, ranks), *(["shard.wire=fp32"] if layout != "single" else [])]
    # Four heads, so that four tensor ranks have one each.
    return train(folder, name, ranks, *options, "model.n_head=4", *LAYOUTS.get(layout, []), *more)


def agrees(folder, device, ranks, layout, optim):
    """Weights of one process and of all ranks after 20 steps."""
    alone = job(folder, "alone", device, 1, "single", optim)
    together = job(folder, "together", device, ranks, layout, optim)
    assert metrics(together, "train")[-1]["step"] == 20
    assert distance(weights_of(alone), weights_of(together)) <= 1e-5


def moves(folder, device, first, others):
    """A run saved in one layout goes on in others, and ends with the same weights."""
    run = job(folder, "run", device, *first, "hybrid", *HALF)
    whole, half = weights_of(run), folder / "half"
    cut_back(run)
    shutil.copytree(run, half)
    for ranks, layout in others:
        shutil.rmtree(run)
        shutil.copytree(half, run)
        job(folder, "run", device, ranks, layout, "hybrid", *HALF)
        assert [row["step"] for row in metrics(run, "train")] == [10, 20]
        assert distance(whole, weights_of(run)) <= 1e-5, layout


@pytest.mark.gpu
@needs_gpu_ranks(4)
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_gpu_ranks_give_the_weights_of_one_process(tmp_path, layout, optim):
    agrees(tmp_path, "cuda", 4, layout, optim)


@pytest.mark.gpu
@needs_gpu_ranks(4)
def test_checkpoints_move_between_layouts_on_a_gpu(tmp_path):
    moves(tmp_path, "cuda", (4, "fsdp_tp"), [(1, "single"), (2, "ddp"), (4, "tp"), (4, "hsdp")])


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize(("ranks", "layout"), [(2, "ddp"), (2, "fsdp"), (2, "tp"), (4, "hsdp")])
def test_cpu_ranks_give_the_weights_of_one_process(tmp_path, ranks, layout, optim):
    agrees(tmp_path, "cpu", ranks, layout, optim)


@pytest.mark.slow
def test_checkpoints_move_between_layouts_on_a_cpu(tmp_path):
    moves(tmp_path, "cpu", (2, "fsdp"), [(1, "single"), (2, "tp")])
