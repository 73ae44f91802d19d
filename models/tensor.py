"""Gains that every tensor rank holds whole, but of whose gradient it finds only a part."""

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle


class SummedGains(ParallelStyle):
    """Style of a module with a `group`, whose gains act on a rank's own heads or neurons.

    torch's styles know weights that are cut, and activations that are. Gains shared by all heads
    are neither: each rank's gradient is that of its heads, and the whole is the sum over ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.group = device_mesh.get_group()  # type: ignore[assignment]
        return module


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous(), "sum", ctx.group), None


def summed(x: Tensor, group: Any) -> Tensor:
    """X itself, whose gradient is summed over a process group; without one, no more than x."""
    return x if group is None else _Summed.apply(x, group)
