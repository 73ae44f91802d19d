"""Whole parameters and pieces of them: gathered, laid out, measured."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import UsageError
from geon.optim.shard import Flat, Layout, Ranks
from geon.optim.step import local, view


def check_contiguous(name: str, param: Tensor) -> None:
    """Refuse a parameter whose storage is no plain sequence of rows.

    Raises:
        UsageError: names the parameter.
    """
    own = local(param)
    if not own.is_contiguous():
        raise UsageError(
            f"parameter '{name}': its local weights of shape {tuple(own.shape)} have strides "
            f"{own.stride()}: make them contiguous before the optimizer is made"
        )


def settled(seen: Iterable[tuple[Any, tuple[Any, ...]]]) -> bool:
    """Whether parameters say how they lie over the ranks.

    Plain ones on several ranks may be about to be cut (accelerate makes the optimizer first), and
    state of their whole size would be in the way.

    seen: parameters with their signatures.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return not several or any(hasattr(param(), "placements") for param, _ in seen)


@torch.no_grad()
def whole(param: Any, layout: Layout | None = None, group: Any = None) -> Tensor:
    """The whole of a parameter; every rank must call where it is cut.

    layout, group: of a run of the flattened parameter that a framework handed over.
    """
    own = param.detach()
    if isinstance(layout, Flat):
        parts = [torch.empty_like(own) for _ in range(layout.ranks)]
        dist.all_gather(parts, own, group=group)
        return torch.cat(parts)[: layout.shape[0] * layout.shape[1]].view(layout.shape)
    return own.full_tensor() if hasattr(own, "full_tensor") else own


@torch.no_grad()
def lay(whole: Tensor, param: Any, layout: Layout | None = None, rank: int = 0) -> None:
    """Write this rank's piece of a whole tensor into a parameter, or into what is laid out like it.

    layout, rank: where the parameter does not say itself how it lies.
    """
    if layout is None:
        if not hasattr(param, "placements"):
            param.copy_(whole.view(param.shape))
            return
        ranks = Ranks.of([("it", param)])
        layout, rank = ranks.layout("it", param), ranks.rank
    stored, given = local(param).detach(), whole.reshape(layout.shape)
    for piece in layout.pieces(rank):
        view(stored, piece).copy_(given[piece.region.slices])


def bytes_of(value: Any) -> int:
    """Bytes of all tensors inside a value: a dict, a list, or an object of another package."""
    if isinstance(value, Tensor):
        own = local(value)
        return own.numel() * own.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return bytes_of(vars(value)) if hasattr(value, "__dict__") else 0
