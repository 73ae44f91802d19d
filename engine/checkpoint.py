"""Checkpoints: which there are, which is the newest that may be used, and loading one.

A checkpoint is a folder step-<N> with the tensors' files and `commit.json`, which says what they
must be (integrity.py). Only tensors go through torch.distributed.checkpoint; all else is JSON.
Nothing here writes: see writing.py.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from geon.engine import integrity, kept
from geon.engine.integrity import COMMIT, FOLDER, Refused
from geon.engine.parallel import Parallel
from geon.engine.reading import TensorReader
from geon.errors import UsageError
from geon.models import ARCHITECTURES, LanguageModel
from geon.optim import HybridOptimizer
from geon.optim.rounding import DRAWS

LATEST = "latest"


def folder_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def folders(root: Path) -> list[Path]:
    """All folders, and links, that are named as checkpoints under a folder."""
    if not root.is_dir():
        return []
    return [
        p for p in root.iterdir() if FOLDER.fullmatch(p.name) and (p.is_dir() or p.is_symlink())
    ]


def committed(root: Path) -> list[Path]:
    """Checkpoints under a folder whose commit file and sizes hold, in the order of their commits.

    Anything else there is ignored. Bytes are not read: see `integrity.sound`.
    """
    found = [(facts, path) for path in folders(root) if (facts := integrity.likely(path))]
    found.sort(key=lambda one: (one[0]["serial"], one[0]["step"]))
    return [path for _, path in found]


def candidates(place: Path) -> list[Path]:
    """What a run folder, a checkpoints folder or a checkpoint offers, newest first.

    Folders whose commit file cannot be read come before all others: they may be the newest.
    """
    if (place / COMMIT).is_file() or FOLDER.fullmatch(place.name):
        return [place] if place.is_dir() else []
    inside = folders(place / "checkpoints") or folders(place)

    def age(path: Path) -> tuple[float, int]:
        step = int(path.name.removeprefix("step-"))
        try:
            return integrity.facts_of(path)["serial"], step
        except Refused:
            return float("inf"), step

    return sorted(inside, key=age, reverse=True)


def find(place: Path) -> Path | None:
    """Checkpoint meant by a run folder, a checkpoints folder or a checkpoint; the newest in it.

    It is not verified: see `newest_sound`.
    """
    found = [path for path in candidates(place) if integrity.likely(path)]
    return found[0] if found else None


class Choice(NamedTuple):
    """A checkpoint that may be used.

    Attributes:
        path: where it is; None where there is none at all.
        facts: its commit file.
        said: a line on each that was refused before it, and on one without digests.
    """

    path: Path | None
    facts: dict[str, Any]
    said: list[str]


def newest_sound(place: Path, fall_back: bool) -> Choice:
    """The newest checkpoint that is whole, unchanged and one's own; reads every byte of it.

    place: run folder, checkpoints folder or checkpoint.
    fall_back: whether an older one may stand in for one that is refused.

    Raises:
        UsageError: lists why each was refused, where none is left or none may stand in.
    """
    refused: list[str] = []
    found = candidates(place)
    for path in found:
        try:
            facts = integrity.check(path)
        except Refused as error:
            refused.append(f"refused checkpoint {path}: {error}")
            if not fall_back:
                break
            continue
        if facts["files"] is None:
            refused.append(f"{path} is of format {facts['format']}, without digests: not verified")
        return Choice(path, facts, refused)
    if not found:
        return Choice(None, {}, [])
    listed = "; ".join(refused)
    if not fall_back:
        others = "" if len(found) == 1 else f"; or name another one, such as '{found[1]}'"
        raise UsageError(f"{listed}. Restore it{others}")
    raise UsageError(
        f"'{place}' has checkpoints, and none can be used: {listed}. Restore one, or start anew "
        "with checkpoint.resume=never"
    )


def read_commit(checkpoint: Path) -> dict[str, Any]:
    """Content of a checkpoint's commit file, with defaults for what earlier versions left out.

    Raises:
        UsageError: not a checkpoint of this format.
    """
    try:
        return integrity.facts_of(checkpoint)
    except Refused as error:
        raise UsageError(f"'{checkpoint}' is not a readable checkpoint: {error}") from None


def earlier(root: Path, end: str = "") -> str:
    """Say which checkpoint is the newest that is there; nothing if there is none."""
    found = committed(root)
    return f"The last checkpoint is '{found[-1]}'{end}" if found else ""


def check_same_model(checkpoint: Path, facts: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another model. What it does not say is as by default.

    Raises:
        UsageError: names the first field that differs, with both values.
    """
    saved = ARCHITECTURES[own["arch"]].shape_type.defaults() | facts["model"]
    for key in own:
        if saved.get(key) != own[key]:
            raise UsageError(
                f"'{checkpoint}' is of another model: model.{key} is {saved.get(key)} there and "
                f"{own[key]} here; set it alike, or checkpoint.resume=never"
            )


def model_of(checkpoint: Path, facts: Mapping[str, Any]) -> LanguageModel:
    """The architecture that a checkpoint is of, on the meta device.

    Raises:
        UsageError: the commit file does not describe one.
    """
    shape = dict(facts["model"])
    arch, numbers = shape.pop("arch"), [v for v in shape.values() if type(v) is int]
    tensors = len(TensorReader(checkpoint).read_metadata().state_dict_metadata)
    try:
        if shape.get("n_layer", 0) > tensors or max(numbers, default=0) > 2**40:
            raise ValueError(f"more layers than its {tensors} tensors make, or sizes beyond 2^40")
        with torch.device("meta"):
            kind = ARCHITECTURES[arch]
            return kind(kind.shape_type.of(shape))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UsageError(f"'{checkpoint}' describes no model of this version: {reason}") from None


def tensors(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is saved: weights and optimizer state by name."""
    named = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
    return named | {f"optim.{name}": tensor for name, tensor in state.items()}


def shapes(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each tensor in a checkpoint, by name."""
    index = TensorReader(checkpoint).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in index.items()}


def begin_state(checkpoint: Path, facts: Mapping[str, Any], optimizer: HybridOptimizer) -> None:
    """Make the state that other packages' optimizers keep, to be loaded into.

    Raises:
        UsageError: the checkpoint was written by another optimizer.
    """
    saved = shapes(checkpoint)

    def make(name: str, where: str) -> Tensor:
        if f"optim.{name}" not in saved:
            raise UsageError(f"'{checkpoint}' lacks 'optim.{name}', which its commit file lists")
        size, dtype = saved[f"optim.{name}"]
        own = next(iter(optimizer.named_parameters()))[1].device
        return torch.zeros(size, dtype=dtype, device=own if where == "own" else "cpu")

    kept.restore(optimizer, facts["state"] or {}, make)


def load(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    parallel: Parallel,
) -> None:
    """Load weights and optimizer state in place, at any number of ranks. Runs no code of files.

    Raises:
        UsageError: the checkpoint lacks a tensor that the model or optimizer has, has another shape
            of it, was written by another optimizer, or cannot be read.
    """
    _load(checkpoint, tensors(weights, state), alone=parallel.mesh is None)


def load_weights(checkpoint: Path, model: LanguageModel) -> None:
    """Load weights alone into a model on one process. Runs no code of files.

    Raises:
        UsageError: as `load`.
    """
    _load(checkpoint, tensors(dict(model.named_parameters()), {}), alone=True)


def _load(checkpoint: Path, wanted: dict[str, Tensor], alone: bool) -> None:
    reader = TensorReader(checkpoint)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except OSError as error:
        raise UsageError(f"'{checkpoint}' cannot be read: {error}") from None
    # Momenta that rested in fp32, or in bf16 before 2026-12, come without a count of roundings.
    counts = {name for name in wanted if name.endswith(f".{DRAWS}")}
    if missing := sorted(set(wanted) - set(saved) - counts):
        raise UsageError(
            f"'{checkpoint}' lacks '{missing[0]}' and {len(missing) - 1} more tensors: it was "
            "written with another optim group; set it alike, or checkpoint.resume=never"
        )
    wanted = {name: own for name, own in wanted.items() if name in saved}
    for name, own in wanted.items():
        if saved[name].size != own.shape:
            raise UsageError(
                f"'{checkpoint}' holds '{name}' of shape {tuple(saved[name].size)}, expected "
                f"{tuple(own.shape)}: it is of another model or optim group"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        reason = f"{type(first).__name__}: {first}".splitlines()[0][:200]
        raise UsageError(f"'{checkpoint}' cannot be loaded: {reason}") from None
