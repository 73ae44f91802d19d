"""Checkpoints: torch.distributed.checkpoint written aside, synced, renamed, then pointed to.

A checkpoint is a folder step-<N> with the tensor shards and `commit.json`. It is written under
another name and renamed when whole, so a folder of that name is complete; `latest` is replaced
last. Only tensors go through torch.distributed.checkpoint; all else is JSON.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.models import LanguageModel

FORMAT = 1
COMMIT = "commit.json"
LATEST = "latest"
_FOLDER = re.compile(r"step-(\d{7,})")


def folder_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:07d}"


def committed(root: Path) -> list[Path]:
    """Complete checkpoints under a folder, oldest first. Anything else there is ignored."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _FOLDER.fullmatch(p.name) and (p / COMMIT).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def find(path: Path) -> Path | None:
    """Checkpoint meant by a run folder, a checkpoints folder or a checkpoint; the newest in it."""
    if (path / COMMIT).is_file():
        return path
    inside = committed(path / "checkpoints") or committed(path)
    return inside[-1] if inside else None


def read_commit(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint's commit file.

    Raises:
        UsageError: not a checkpoint of this format.
    """
    try:
        facts = json.loads((checkpoint / COMMIT).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"'{checkpoint}' is not a readable checkpoint: {error}") from None
    if facts.get("format") != FORMAT:
        raise UsageError(
            f"'{checkpoint}' is of checkpoint format {facts.get('format')}, expected {FORMAT}"
        )
    return facts


def check_same_model(checkpoint: Path, facts: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another model.

    Raises:
        UsageError: names the first field that differs, with both values.
    """
    saved = facts["model"]
    for key in own:
        if saved.get(key) != own[key]:
            raise UsageError(
                f"'{checkpoint}' is of another model: model.{key} is {saved.get(key)} there and "
                f"{own[key]} here; set it alike, or checkpoint.resume=never"
            )


def tensors(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is saved: weights and optimizer state by name."""
    named = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
    return named | {f"optim.{name}": tensor for name, tensor in state.items()}


def save(
    root: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int,
    parallel: Parallel,
) -> Path:
    """Save a checkpoint and drop the oldest beyond `keep`. Every rank must call this.

    facts: JSON for the commit file, besides step and format.
    """
    target, aside = root / folder_name(step), root / f"{folder_name(step)}.writing"
    if parallel.env.main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    parallel.barrier()
    writer = dcp.FileSystemWriter(aside, sync_files=True)
    with _quiet():
        dcp.save(tensors(weights, state), storage_writer=writer, no_dist=parallel.mesh is None)
    parallel.barrier()
    if parallel.env.main:
        content = {"format": FORMAT, "step": step, **facts}
        _write_synced(aside / COMMIT, json.dumps(content, indent=2))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _sync_folder(root)
        _write_synced(root / f"{LATEST}.writing", target.name)
        (root / f"{LATEST}.writing").replace(root / LATEST)
        _sync_folder(root)
        for old in committed(root)[:-keep]:
            shutil.rmtree(old)
    parallel.barrier()
    return target


def load(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    parallel: Parallel,
) -> None:
    """Load weights and optimizer state in place, at any number of ranks.

    Raises:
        UsageError: the checkpoint lacks a tensor that the model or optimizer has, or was written
            by another optimizer.
    """
    reader = dcp.FileSystemReader(checkpoint)
    saved = set(reader.read_metadata().state_dict_metadata)
    wanted = tensors(weights, state)
    if missing := sorted(set(wanted) - saved):
        raise UsageError(
            f"'{checkpoint}' lacks '{missing[0]}' and {len(missing) - 1} more tensors: it was "
            "written with another optim group; set it alike, or checkpoint.resume=never"
        )
    with _quiet():
        dcp.load(wanted, storage_reader=reader, no_dist=parallel.mesh is None)


def load_weights(checkpoint: Path, model: LanguageModel) -> None:
    """Load weights alone into a model on one process."""
    with _quiet():
        named = dict(model.named_parameters())
        dcp.load(tensors(named, {}), storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is one process, which `no_dist` already says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_unfinished(root: Path) -> Iterator[Path]:
    """Remove what an interrupted save left; yields each removed path."""
    for path in root.glob("step-*.writing"):
        shutil.rmtree(path, ignore_errors=True)
        yield path
