"""The same runs on a GPU and on the CPU, and what differs there by design."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from geon.data import Batches, Loader, Split
from geon.models.loss import linear_cross_entropy
from geon.optim import HybridOptimizer
from geon.optim.manifolds.spectral import SpectralBall, schatten_64
from tests.distributed.jobs import STIEFEL, report, train
from tests.optim.contract import LR, RULES, Net, feed, group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FP32 = ["parallel.precision=fp32", "optim.polar.dtype=fp32", "optim.solver.form=gram"]


@pytest.mark.parametrize(
    "optim", [["optim=hybrid"], STIEFEL, ["optim=muon"], ["optim=scion"], ["optim=adamw"]]
)
def test_fp32_on_a_gpu_is_fp32_on_a_cpu(tmp_path, optim):
    runs = [
        report(train(tmp_path, device, 1, "parallel=single", *FP32, *optim, f"device={device}"))
        for device in ("cpu", "cuda")
    ]
    losses = [run["val_nats_per_token"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert runs[1]["hardware"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_nccl_and_bf16_train(tmp_path, layout):
    folder = train(tmp_path, layout, 1, f"parallel={layout}", "device=cuda", "optim=hybrid")
    single = train(tmp_path, "single", 1, "parallel=single", "device=cuda", "optim=hybrid")
    found, wanted = (report(run)["val_nats_per_token"] for run in (folder, single))
    assert found == pytest.approx(wanted, abs=2e-2)


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
def test_the_ball_caps_as_on_a_cpu(shape):
    ball = SpectralBall(2.0)
    draw = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    near = draw * torch.tensor([0.5, 1.0, 1.3])[:, None, None]
    top = torch.linalg.matrix_norm(near.double(), 2)
    norms = schatten_64(near.cuda()).cpu().double()
    assert (norms >= top * 0.997).all()
    assert (norms <= top * 1.003 * min(shape) ** (1 / 64)).all()
    weight = draw * torch.tensor([0.5, 3.0, 30.0])[:, None, None]
    capped = ball.retract(weight.cuda()).cpu()
    torch.testing.assert_close(capped, ball.retract(weight), atol=1e-3, rtol=0)
    assert torch.equal(capped[0], weight[0])


@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp"])
def test_compiled_in_bf16_trains_as_eager(tmp_path, layout):
    options = [f"parallel={layout}", "device=cuda", "optim=muon", "eval.every=5"]
    options += ["data.micro_batch=8", "model.softcap=15"]
    losses = [
        report(train(tmp_path, f"compile_{on}", 1, *options, f"parallel.compile={on}"))[
            "val_nats_per_token"
        ]
        for on in ("false", "null")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)


def test_the_loader_brings_the_same_tokens():
    tokens = np.random.default_rng(0).integers(0, 60_000, 4001).astype(np.uint16)
    batches = Batches(Split("draws", [tokens]), 8, 12, 0, 1, 4)
    loader = Loader(batches, torch.device("cuda", 0))
    for step in range(20):
        for (x, y), found in zip(batches.step(step), loader.step(step), strict=True):
            assert torch.equal(x, found[0].cpu()) and torch.equal(y, found[1].cpu())
    loader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_is_torch_s_and_loads_state_from_a_cpu(dtype):
    net, rule = Net("adamw", dtype), RULES["adamw"]
    before = HybridOptimizer([group(net)])
    feed(net, 0)
    before.step()
    saved = copy.deepcopy(before.state_dict())
    net.zero_grad()
    ours, theirs = copy.deepcopy(net).cuda(), copy.deepcopy(net).cuda()
    optimizer = HybridOptimizer([group(ours)])
    other = torch.optim.AdamW(theirs.named_parameters(), LR, rule.betas, rule.eps, rule.decay)
    optimizer.load_state_dict(saved)
    other.load_state_dict(saved)
    other.param_groups[0]["fused"] = True
    other.state[theirs.a]["step"] = other.state[theirs.a]["step"].cuda()
    other.state[theirs.b]["step"] = other.state[theirs.b]["step"].cuda()
    for seed in (1, 2):
        for one, by in ((ours, optimizer), (theirs, other)):
            feed(net, seed)
            for p, q in zip(one.parameters(), net.parameters(), strict=True):
                p.grad = q.grad.cuda()
            by.step()
    assert torch.equal(ours.a, theirs.a)
    assert optimizer.state[ours.a]["step"].is_cuda


@pytest.mark.parametrize(("softcap", "chunks"), [(0.0, 1), (15.0, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_is_that_of_the_logits(softcap, chunks, compiled):
    x, weight = torch.randn(300, 64).cuda().bfloat16(), torch.randn(5000, 64).cuda().bfloat16()
    operands = [x.requires_grad_(), weight.requires_grad_()]
    targets = torch.randint(0, 5000, (300,)).cuda()
    targets[7] = -100
    of = torch.compile(linear_cross_entropy, dynamic=False) if compiled else linear_cross_entropy
    ours = of(*operands, targets, 0.5, softcap, chunks)
    wide = [one.detach().double().requires_grad_() for one in operands]
    logits = 0.5 * (wide[0] @ wide[1].mT)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    theirs = F.cross_entropy(logits, targets)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-2, rtol=0)
    found = torch.autograd.grad(ours, operands)
    for a, b in zip(found, torch.autograd.grad(theirs, wide), strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()
