"""What the ranks of a job must agree on before the first step, and decisions of the main rank."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

import geon
from geon.configs.changes import is_place
from geon.engine.parallel import Parallel
from geon.errors import SaveError, UsageError

T = TypeVar("T")


def on_main(parallel: Parallel, action: Callable[[], T]) -> T:
    """What an action of the main rank returned, on every rank; every rank must call.

    Raises:
        UsageError: the main rank's, on every rank.
        SaveError: on every rank, where the main one met an error of the disk.
        RuntimeError: another error of the main rank, on the others.
    """
    done, told, error = None, None, None
    if parallel.env.main:
        try:
            done = action()
        except Exception as caught:
            error = SaveError(str(caught)) if isinstance(caught, OSError) else caught
            kinds = (kind for kind in (UsageError, SaveError) if isinstance(error, kind))
            told = next(kinds, None), str(caught)
    done, told = parallel.gather((done, told))[0]
    if error is not None:
        raise error
    if told is not None:
        raise told[0](told[1]) if told[0] else RuntimeError(f"rank 0: {told[1]}")
    return done


def check_alike(parallel: Parallel, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuse ranks of one job with other settings, data or versions; every rank must call.

    settings: the config by dotted key. data: facts of the corpus.

    Raises:
        UsageError: on every rank, the same: the first key that differs on the lowest such rank.
    """
    known = "sha256" in data  # the same data may lie elsewhere on another host
    found = {k: v for k, v in settings.items() if not (known and is_place(k))}
    told = ("name", "no text")  # may hold paths of a host
    found |= {f"data: {key}": value for key, value in data.items() if key not in told}
    found |= {"version of torch": torch.__version__, "version of geon": geon.__version__}
    content = json.dumps(found, sort_keys=True, default=str)
    digests = parallel.gather(hashlib.sha256(content.encode()).hexdigest())
    odd = next((rank for rank, one in enumerate(digests) if one != digests[0]), None)
    if odd is None:
        return
    everyone = parallel.gather(found if parallel.env.rank in (0, odd) else None)
    first, other = everyone[0], everyone[odd]
    keys = [key for key in {*first, *other} if first.get(key) != other.get(key)]
    keys.sort(key=lambda key: (" " in key, key.count("."), key))  # keys of the config, outer first
    more = f", and {len(keys) - 1} more differ" if keys[1:] else ""
    raise UsageError(
        f"ranks of one job differ: {keys[0]} is {first.get(keys[0])} on rank 0 and "
        f"{other.get(keys[0])} on rank {odd}{more}; start all ranks by the same command on the "
        "same data"
    )
