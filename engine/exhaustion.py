"""Out of memory is one message: what was asked for, what was predicted, what needs less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from geon.configs.schema import Config
from geon.engine.fitting import keys_to_try
from geon.engine.memory import Prediction
from geon.errors import OutOfMemory

_CPU = "DefaultCPUAllocator"
"""In what torch says when the system gives no memory, of type RuntimeError."""


def is_exhaustion(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _CPU in str(error)
    )


def message(
    error: BaseException, config: Config, memory: Prediction | None, rank: int, where: str
) -> str:
    """What is printed. where: "training", "evaluation", or what else was going on."""
    asked = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    keys = keys_to_try(config.parallel.layout, memory)
    if where == "evaluation":
        keys = [f"eval.batch lower (now {config.eval.batch})", *keys[-2:]]
    table = f"\n{memory.table()}" if memory is not None else ""
    return (
        f"rank {rank} ran out of memory in {where}: {asked}{table}\n"
        f"Try in this order: {', '.join(keys)}"
    )


@contextmanager
def explained(
    config: Config, memory: Prediction | None, rank: int, where: str = "training"
) -> Iterator[None]:
    """Around what may run out of memory.

    Raises:
        OutOfMemory: in place of torch's errors.
    """
    try:
        yield
    except RuntimeError as error:
        # The exchange tells its own story of what fails in a collective.
        for one in (error, error.__cause__):
            if one is not None and is_exhaustion(one):
                raise OutOfMemory(message(one, config, memory, rank, where)) from None
        raise
