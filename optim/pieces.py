"""What a rank holds of a parameter, and of its gradient."""

from typing import Any

from torch import Tensor

from geon.optim.shard import Piece


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def grad_of(param: Tensor) -> Tensor:
    """This rank's piece of a gradient, laid out like its parameter; a sparse one made dense."""
    grad: Any = param.grad
    if grad.is_sparse:
        return grad.to_dense()
    placements = getattr(param, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    return local(grad).contiguous()


def view(stored: Tensor, piece: Piece) -> Tensor:
    """A piece of a rank's contiguous storage as a matrix; no copy."""
    offset = stored.storage_offset() + piece.offset
    return stored.as_strided(piece.region.shape, (piece.stride, 1), offset)
