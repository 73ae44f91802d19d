"""DeepSpeed trains what DDP trains at every stage and precision, and steps what it holds."""

import pytest
import torch
from torch import nn

from geon.engine.backends import DeepSpeed
from geon.errors import UsageError
from tests.distributed.jobs import by_rank, train

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    "recipes",
    [
        ("hybrid", "adamw"),
        pytest.param(
            ("muon", "manifold_muon", "normuon", "scion", "muonh", "spectral_sphere"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_stage_and_precision_trains_as_ddp_does(recipes):
    """Stage 0 in bf16 trained nothing for a while: it stepped tensors that nobody held any more."""
    rows = by_rank(2, "deepspeed_job.py", recipes, timeout=280)[0]
    assert len(rows) == len(recipes) * 2 * 4
    for recipe, precision, stage, loss, wanted, least in rows:
        case = f"{recipe} {precision} stage {stage}"
        # bf16 gradients are averaged in bf16 by DeepSpeed, in fp32 by DDP.
        assert loss == pytest.approx(wanted, abs=1e-5 if precision == "fp32" else 5e-3), case
        assert least > 1e-4, case


def test_stepping_another_tensor_than_was_held_is_refused():
    """As another version of DeepSpeed might."""
    held = {"w": nn.Parameter(torch.zeros(4, 4))}
    backend = object.__new__(DeepSpeed)
    backend._held, backend._deepspeed = held, type("deepspeed", (), {"__version__": "9"})
    with pytest.raises(UsageError, match="'w': DeepSpeed 9 steps another tensor"):
        backend._step({"w": nn.Parameter(torch.zeros(4, 4))})
    with pytest.raises(UsageError, match="steps w while nothing has a gradient"):
        backend._step(held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optim=hybrid", "optim.nonfinite=skip"], "optim.nonfinite=skip with parallel=deepspeed"),
        (
            ["optim=muon", "optim.hidden.idle=coast", "optim.max_norm=0"],
            "optim.hidden.idle=coast with parallel=",
        ),
        (["optim=hybrid", "logger.geometry_every=2"], "logger.geometry_every 2 with parallel="),
        (["optim=adamw", "optim.max_norm=1"], "optim.max_norm 1.0 with parallel=deepspeed"),
    ],
)
def test_what_cannot_be_done_parameter_by_parameter_is_refused(tmp_path, options, message):
    done = train(tmp_path, "run", 1, "parallel=deepspeed_z2", *options, ok=False)
    assert done.returncode != 0
    assert message in done.stderr
