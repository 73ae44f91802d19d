"""Tiny runs in this process that leave checkpoints, for the tests of them."""

from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from geon.engine import checkpoint
from geon.engine.main import execute
from geon.engine.reading import TensorReader
from geon.engine.writing import quiet
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.launch.jobs import SMALLEST

TINY = [*SMALLEST, "parallel=single", "parallel.compile=false", "logger.progress=false"]


def run(output: Path, *options: str, name: str = "run") -> Path:
    """Train in this process; returns the run folder."""
    execute(compose([*TINY, f"output={output}", f"name={name}", *options]), Env())
    return output / name


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, or of a run's newest one."""
    found = checkpoint.find(path)
    reader = TensorReader(found)
    index = reader.read_metadata().state_dict_metadata
    held = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in index.items()}
    with quiet():
        dcp.load(held, storage_reader=reader, no_dist=True)
    return held


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
