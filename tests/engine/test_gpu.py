"""The same runs on a GPU and on the CPU, and what differs there by design."""

import pytest
import torch

from geon.optim.manifolds.spectral import SpectralBall, schatten_64
from tests.distributed.jobs import STIEFEL, report, train

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
