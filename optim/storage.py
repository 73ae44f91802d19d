"""Where a parameter's numbers lie on this rank: its piece, its gradient, its storage."""

from typing import Any

from torch import Tensor

from geon.errors import UsageError


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def grad_of(param: Tensor) -> Tensor:
    """This rank's piece of a gradient, laid out like its parameter."""
    grad: Any = param.grad
    placements = getattr(param, "placements", None)
    if placements is not None and grad.placements != placements:
        grad = grad.redistribute(placements=placements)
    return local(grad)


def flat(name: str, param: Tensor) -> Tensor:
    """Storage of this rank's weights as a vector; no copy."""
    own = local(param).detach()
    if not own.is_contiguous():
        raise UsageError(
            f"parameter '{name}': its local weights of shape {tuple(own.shape)} have strides "
            f"{own.stride()}: make them contiguous before the optimizer is made"
        )
    return own.view(-1)


def signature(param: Any) -> tuple[Any, ...]:
    """How a parameter lies: what may not change after the plan was made."""
    place = (tuple(param.shape), param.dtype, param.device.type)
    if hasattr(param, "placements"):
        return (*place, param.placements, param.device_mesh)
    return place


def bytes_of(value: Any) -> int:
    """Bytes of all tensors inside: of a dict, a list, or an object that another package made."""
    if isinstance(value, Tensor):
        own = local(value)
        return own.numel() * own.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    return bytes_of(vars(value)) if hasattr(value, "__dict__") else 0
