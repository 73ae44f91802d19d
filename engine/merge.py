"""Averages of checkpoints whose weights stay on their manifolds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine import build, checkpoint, writing
from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.launch.env import Env
from geon.models import LanguageModel
from geon.optim import on_manifold


@torch.no_grad()
def merge(
    paths: Sequence[Path], shares: Sequence[float], model: LanguageModel, routing: build.Routing
) -> None:
    """Fill `model` with the weighted mean of checkpoints, taken in float64.

    The mean of points of a curved manifold lies inside it (the mean of two rotations is shorter
    than a rotation), so every constrained matrix is brought back to its nearest point.

    Raises:
        UsageError: fewer than one checkpoint, shares that do not fit, another model, or a mean
            without a nearest point.
    """
    if not paths or len(paths) != len(shares) or min(shares) < 0 or sum(shares) <= 0:
        raise UsageError(
            f"{len(paths)} checkpoints need as many shares, none negative and not all 0; got "
            f"{list(shares)}"
        )
    total = float(sum(shares))
    sums: dict[str, Tensor] = {}
    for path, share in zip(paths, shares, strict=True):
        facts = checkpoint.newest_sound(path, fall_back=False).facts
        checkpoint.check_same_model(path, facts, build.fingerprint(model))
        checkpoint.load_weights(path, model)
        for name, param in model.named_parameters():
            part = param.double() * (share / total)
            sums[name] = sums[name] + part if name in sums else part
    params = dict(model.named_parameters())
    for info in routing.infos:
        mean, rule = sums[info.name].to(params[info.name].dtype), routing.rule(info)
        params[info.name].copy_(on_manifold(info, mean, rule, routing.per_head(info)))


def save(target: Path, model: LanguageModel, like: Path, facts: dict[str, Any]) -> Path:
    """Write the model as a checkpoint without optimizer state: to evaluate and to generate from."""
    commit = checkpoint.read_commit(like)
    step = commit.pop("step")
    for key in ("format", "sha256", "files", "serial", "state"):
        commit.pop(key, None)
    weights = checkpoint.tensors(dict(model.named_parameters()), {})
    return writing.save(
        target / "checkpoints", step, weights, commit | facts, 1, writing.Peers(_alone())
    )


def _alone() -> Parallel:
    return Parallel(ParallelConfig(layout=Layouts.single), Env(), torch.device("cpu"))
