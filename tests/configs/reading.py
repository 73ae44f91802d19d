"""Which keys of its config a run reads, counted in one."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geon.configs import schema
from geon.configs.recipes import OptimConfig

NODES = {
    "": schema.Config,
    "model": schema.ModelConfig,
    "optim": OptimConfig,
    "data": schema.DataConfig,
    "parallel": schema.ParallelConfig,
    "schedule": schema.ScheduleConfig,
    "checkpoint": schema.CheckpointConfig,
    "health": schema.HealthConfig,
    "logger": schema.LoggerConfig,
    "eval": schema.EvalConfig,
    "shard": schema.ShardConfig,
    "plan": schema.PlanConfig,
}
_ALL = (Path(schema.__file__).parent, Path(__file__).parent)
"""Code that reads every key, whatever it is for: it checks, copies or writes down."""


@contextmanager
def recorded():
    """Gives the set of keys that are read while it is open, but by what reads all of them."""
    found: set[str] = set()
    everywhere = ("dataclasses.py", "copy.py")

    def watch(place: str, node: type) -> Any:
        def get(self: Any, name: str) -> Any:
            file = Path(sys._getframe(1).f_code.co_filename)
            if file.name not in everywhere and file.parent not in _ALL:
                found.add(f"{place}.{name}" if place else name)
            return object.__getattribute__(self, name)

        return get

    try:
        for place, node in NODES.items():
            node.__getattribute__ = watch(place, node)  # type: ignore[method-assign]
        yield found
    finally:
        for node in NODES.values():
            del node.__getattribute__
