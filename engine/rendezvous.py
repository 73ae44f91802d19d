"""How ranks meet: in a place of their own for each attempt of torchrun.

torchrun keeps one key-value store for all attempts of a job. A restarted rank that joined a
process group there would read the address that its dead forerunner left. So the main rank draws a
name for the attempt and tells it to the ranks that are alive; keys of the attempt begin with it.
The count of restarts would not do: agents of several nodes count on their own.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from geon.errors import RankLost

_POLL_SECONDS = 0.02
_OF_NCCL = ("exception_dump", "remote_error")
"""Keys by which NCCL's process group tells of an error, in the store below all prefixes: what the
last attempt left there would end this one (kStoreDumpKey and kStoreErrorSignalKey of torch)."""


def join(backend: str, timeout: float) -> dist.Store:
    """Make the default process group; returns the store of this attempt.

    timeout: seconds, of the meeting and of each collective.

    Raises:
        RankLost: a rank did not come in time.
    """
    limit = timedelta(seconds=timeout)
    store, rank, world = next(iter(rendezvous("env://", timeout=limit)))
    store.set_timeout(limit)
    name = _call(store, world, timeout) if rank == 0 else _answer(store, rank, timeout)
    own = dist.PrefixStore(name, store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=limit)
    return own


def _call(store: dist.Store, world: int, timeout: float) -> str:
    """Draw the attempt's name, and tell it to every rank that says who it is."""
    for key in _OF_NCCL:
        store.delete_key(key)
    name, deadline = f"geon-{uuid.uuid4().hex}", time.monotonic() + timeout
    told: dict[int, bytes] = {}
    missing = set(range(1, world))
    while missing:
        for rank in sorted(missing):
            if store.check([f"geon-here-{rank}"]):
                # A dead forerunner may have said so: then its successor will, and gets an answer.
                who = store.get(f"geon-here-{rank}")
                if told.get(rank) != who:
                    store.set(f"geon-name-{who.decode()}", name)
                    told[rank] = who
            if store.check([f"{name}/came-{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            raise RankLost(
                f"rank 0: rank {', '.join(map(str, sorted(missing)))} of {world} did not come "
                f"within parallel.timeout_seconds={timeout:g}"
            )
        if missing:
            time.sleep(_POLL_SECONDS)
    return name


def _answer(store: dist.Store, rank: int, timeout: float) -> str:
    """Say who this rank is, and learn the attempt's name from the main rank of the same attempt."""
    who = uuid.uuid4().hex
    store.set(f"geon-here-{rank}", who)
    try:
        name = store.get(f"geon-name-{who}").decode()
    except dist.DistStoreError:
        raise RankLost(
            f"rank {rank}: rank 0 did not come within parallel.timeout_seconds={timeout:g}"
        ) from None
    store.set(f"{name}/came-{rank}", "")
    return name
