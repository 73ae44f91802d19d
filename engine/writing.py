"""Writing checkpoints: aside, synced, hashed, committed, renamed; and dropping old ones.

A checkpoint is written into step-<N>.writing. Its commit file is written last, with the size and
SHA-256 of every other file, and then the folder is renamed: step-<N> is whole or absent. A folder
of the same step that is there already is moved aside before and removed after.
"""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from geon.engine.checkpoint import LATEST, committed, earlier, folder_name, folders
from geon.engine.hashing import HashingWriter
from geon.engine.integrity import COMMIT, Refused, facts_of, likely, sealed, sound
from geon.engine.parallel import Parallel
from geon.errors import SaveError

T = TypeVar("T")
_LEFT = re.compile(r"(step-\d{7,15})\.(writing|old|removing)")
_OVERHEAD = 4096
"""Bytes that a saved tensor takes besides its entries."""


class Peers:
    """The ranks that save together, and how they hear of each other's errors.

    group: process group of their messages; None takes the default one. A thread beside the training
        needs one of its own, on gloo: collectives of two threads on one group would mix.
    """

    def __init__(self, parallel: Parallel, group: Any = None) -> None:
        self.main, self.world = parallel.env.main, parallel.env.world
        self.alone, self.group = parallel.mesh is None, group

    def gather(self, content: Any) -> list[Any]:
        """Objects of all ranks, on every rank."""
        if self.alone:
            return [content]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, content, group=self.group)
        return everyone

    def together(self, action: Callable[[], T], explain: Callable[[BaseException], str]) -> list[T]:
        """What an action gives on each rank.

        explain: the message that an error of this rank is raised with, on all ranks.

        Raises:
            SaveError: on every rank, where the action failed on one.
        """
        found: Any = None
        error: BaseException | None = None
        try:
            found = action()
        except (Exception, CheckpointException) as caught:  # the latter is a BaseException
            error = caught
        everyone = self.gather((explain(error) if error else None, found))
        if failed := [said for said, _ in everyone if said is not None]:
            raise SaveError(failed[0]) from error
        return [found for _, found in everyone]


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int,
    peers: Peers,
) -> Path:
    """Save a checkpoint and drop the oldest beyond `keep`. Every rank must call this.

    facts: JSON for the commit file, besides step and what describes the files.

    Raises:
        FloatingPointError: a tensor is not finite, on every rank; nothing was written.
        SaveError: the disk is full, or failed; nothing of the checkpoint is left, others are as
            they were.
    """
    check_finite(root, step, tensors, peers)
    target, aside = root / folder_name(step), root / f"{folder_name(step)}.writing"
    needed = sum(t.numel() * t.element_size() + _OVERHEAD for t in tensors.values()) + 2**16
    free = 0

    def explain(error: BaseException) -> str:
        found = writer.disk.error if writer is not None else None
        found = found or next(_os_errors(error), None)
        begun = f"the checkpoint of step {step} was not saved under '{root}': "
        if found is None:  # not the disk's fault
            return f"{begun}{type(error).__name__}: {error}. {earlier(root)}"
        return (
            f"{begun}{found.strerror or found}. It needs {needed:,} bytes, {free:,} were free. "
            f"{earlier(root, '. ')}Make room, or keep fewer (checkpoint.keep)"
        )

    def begin() -> int:
        nonlocal free
        if peers.main:
            remove(aside)
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < needed:
                raise OSError("the disk has too little room")
            aside.mkdir()
        return free

    def write() -> dict[str, Any]:
        with quiet():
            dcp.save(
                dict(tensors), storage_writer=writer, no_dist=peers.alone, process_group=peers.group
            )
        assert writer is not None
        return writer.disk.files

    writer: HashingWriter | None = None
    try:
        free = peers.together(begin, explain)[0]
        writer = HashingWriter(aside)
        everyone = peers.together(write, explain)
        files = {name: entry for part in everyone for name, entry in part.items()}

        def commit() -> None:
            if peers.main:
                _commit(aside, target, {"step": step, **facts, "files": files}, keep)

        peers.together(commit, explain)
    except SaveError:
        if peers.main:
            remove(aside)
        raise
    return target


def check_finite(root: Path, step: int, tensors: Mapping[str, Tensor], peers: Peers) -> None:
    """Refuse to save what is not finite.

    Raises:
        FloatingPointError: on every rank, naming the first tensor.
    """
    bad = nonfinite(tensors)
    everyone = [name for names in peers.gather(bad) for name in names]
    if everyone:
        names = sorted(set(everyone), key=list(tensors).index)
        raise FloatingPointError(
            f"step {step}: '{names[0]}' and {len(names) - 1} more tensors are not finite, so no "
            f"checkpoint is saved: lower optim.lr. {earlier(root)}"
        )


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors of which this rank holds an entry that is nan or infinite."""
    named = {}
    for name, tensor in tensors.items():
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if part.is_floating_point() and part.numel():
            named[name] = part.detach()
    norms = torch._foreach_norm(list(named.values())) if named else []
    places: dict[torch.device, list[int]] = {}
    for i, norm in enumerate(norms):
        places.setdefault(norm.device, []).append(i)
    values = [0.0] * len(norms)
    for indices in places.values():
        read = torch.stack([norms[i].double() for i in indices]).tolist()
        for i, value in zip(indices, read, strict=True):
            values[i] = value
    # A norm of finite entries may overflow: look again there.
    odd = [n for n, value in zip(named, values, strict=True) if not abs(value) < float("inf")]
    return [name for name in odd if not bool(named[name].isfinite().all())]


def _os_errors(error: BaseException) -> Iterator[OSError]:
    """Errors of the operating system in an exception, or in those that torch gathered."""
    if isinstance(error, OSError):
        yield error
    for wrapped in getattr(error, "failures", {}).values():
        yield from _os_errors(wrapped[0])


def _commit(aside: Path, target: Path, content: dict[str, Any], keep: int) -> None:
    """Make what was written a checkpoint, and drop old ones (main rank)."""
    root = target.parent
    found = {p.name: p.stat().st_size for p in aside.iterdir()}
    if found != {name: entry["size"] for name, entry in content["files"].items()}:
        raise OSError(f"'{aside}' holds other files than were written")
    content["serial"] = 1 + max(_serials(root), default=0)
    write_synced(aside / COMMIT, sealed(content))
    for path in (aside, *aside.iterdir()):  # whatever the umask: such a one would not be read
        path.chmod(path.stat().st_mode & ~0o002)
    sync_folder(aside)
    _put(aside, target)
    point_to(root, target.name)
    for old in committed(root)[:-keep]:
        remove(old.rename(root / f"{old.name}.removing"))


def point_to(root: Path, name: str) -> None:
    """Let `latest` name a checkpoint."""
    write_synced(root / f"{LATEST}.writing", name)
    (root / f"{LATEST}.writing").replace(root / LATEST)
    sync_folder(root)


def _serials(root: Path) -> Iterator[int]:
    for path in folders(root):
        try:
            yield facts_of(path)["serial"]
        except Refused:
            continue


def _put(aside: Path, target: Path) -> None:
    """Rename a whole checkpoint to its name, replacing one of that name."""
    old = target.with_name(f"{target.name}.old")
    if target.is_symlink() or target.exists():
        remove(old)
        target.rename(old)
    aside.rename(target)
    sync_folder(target.parent)
    remove(old)


def recover(root: Path) -> list[str]:
    """Put right what interrupted saves left in a checkpoints folder; main rank of its only run.

    A checkpoint that was whole but not yet renamed is renamed; one that was moved aside for it goes
    back if it is not; the rest is removed.

    Returns: a line on each.
    """
    said = []
    there = sorted(root.iterdir()) if root.is_dir() else []
    left = {path: match for path in there if (match := _LEFT.fullmatch(path.name))}
    for path, match in left.items():
        target = root / match[1]
        if match[2] == "writing" and whole(path, target):
            _put(path, target)
            said.append(f"recovered {target}, which was whole but not yet in its place")
    for path, match in left.items():
        target = root / match[1]
        if not path.exists() and not path.is_symlink():
            continue
        if match[2] == "old" and not target.exists():
            path.rename(target)
            said.append(f"put {target} back, whose replacement was not finished")
        else:
            remove(path)
            said.append(f"removed unfinished checkpoint {path}")
    return said


def whole(aside: Path, target: Path) -> bool:
    """Whether a checkpoint that was being written is whole, and of its target's step."""
    facts = likely(aside)
    named = facts is not None and folder_name(facts["step"]) == target.name
    return named and sound(aside) is None


def remove(path: Path) -> None:
    """Remove a folder; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that one process is one process, which `no_dist` already says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def write_synced(path: Path, text: str) -> None:
    """Write a file that survives a power cut."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
