"""The ranks that step together, and how each parameter lies over them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from geon.errors import UsageError
from geon.optim.shard.layout import Grid, Layout


@dataclass(frozen=True)
class Ranks:
    """Every rank of every axis of a device mesh, in row-major order.

    Attributes:
        mesh: the root mesh; None for one process, or for a plain process group.
        group: of all its ranks; None for one process.
        rank: this process's position.
        size: number of ranks.
    """

    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of_group(cls, group: dist.ProcessGroup) -> "Ranks":
        """Ranks of a process group without a mesh, e.g. DeepSpeed's data-parallel ranks."""
        return cls(None, group, dist.get_rank(group), dist.get_world_size(group))

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh, name: str = "mesh") -> "Ranks":
        """All ranks of the root of a mesh. On a mesh of several dimensions every rank must call.

        Raises:
            UsageError: a mesh whose ranks are not in row-major order; `name` is the parameter to
                blame.
        """
        root = _root(mesh)
        ranks = root.mesh.flatten()
        if not bool((ranks[1:] > ranks[:-1]).all()):
            raise UsageError(
                f"{name}: the ranks of {root} are not in ascending order: make the mesh by "
                "init_device_mesh, whose ranks are row-major"
            )
        group: dist.ProcessGroup | None
        if root.ndim == 1:
            group = root.get_group()
        elif root.size() == dist.get_world_size():
            group = dist.group.WORLD
        else:
            group = root._flatten("geon_ranks").get_group()
        position = int((ranks == dist.get_rank()).nonzero())
        return cls(root, group, position, root.size())

    @classmethod
    def of(cls, params: Iterable[tuple[str, Tensor]], mesh: DeviceMesh | None = None) -> "Ranks":
        """Ranks of the given mesh; otherwise of the first DTensor; otherwise this process alone."""
        if mesh is not None:
            return cls.of_mesh(mesh)
        for name, param in params:
            if (own := getattr(param, "device_mesh", None)) is not None:
                return cls.of_mesh(own, f"parameter '{name}'")
        return cls()

    def layout(self, name: str, param: Tensor) -> Layout:
        """How a parameter lies over the ranks. A plain tensor is the same on all of them.

        Raises:
            UsageError: placements or a mesh that no layout describes; names the parameter.
        """
        from torch.distributed.tensor import DTensor

        shape = (*param.shape[:2], math.prod(param.shape[2:])) if param.dim() > 3 else param.shape
        if not isinstance(param, DTensor):
            return Grid.whole(tuple(shape), self.size)
        sizes, dims = self._dims(name, param.device_mesh)
        cuts = _cuts(name, param)
        if param.dim() > 3 and any(axis > 1 for _, axis in cuts):
            raise UsageError(
                f"parameter '{name}' of shape {tuple(param.shape)} is cut as {param.placements}: "
                "weights of four dimensions and more may be cut along the first two"
            )
        return Grid(tuple(shape), sizes, tuple((dims[dim], axis) for dim, axis in cuts))

    def _dims(self, name: str, mesh: DeviceMesh) -> tuple[tuple[int, ...], list[int]]:
        """Sizes of the mesh that the layout is told in, and the place of this mesh's dimensions."""
        if self.mesh is not None and _root(mesh) == self.mesh and mesh.mesh_dim_names:
            known, names = self.mesh.mesh_dim_names or (), mesh.mesh_dim_names
            if all(n in known for n in names):
                return tuple(self.mesh.shape), [known.index(n) for n in names]
        if self.mesh is not None and torch.equal(mesh.mesh.flatten(), self.mesh.mesh.flatten()):
            return tuple(mesh.shape), list(range(mesh.ndim))  # the same ranks, cut otherwise
        raise UsageError(
            f"parameter '{name}' lies on {mesh}, but the optimizer steps over "
            f"{self.mesh or 'one process'}: all meshes must be slices of one root mesh, made by "
            "one init_device_mesh (pass it as HybridOptimizer(mesh=...))"
        )

    @property
    def device(self) -> torch.device:
        """Device of small tensors for collectives."""
        if self.group is not None and "nccl" in dist.get_backend(self.group):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def _root(mesh: DeviceMesh) -> DeviceMesh:
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if root is not None else mesh


def _cuts(name: str, param: Any) -> list[tuple[int, int]]:
    """Cuts of a DTensor, (mesh dimension, axis), in the order in which they were made."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    first: list[tuple[int, int]] = []
    then: list[tuple[int, int]] = []
    for dim, placement in enumerate(param.placements):
        if isinstance(placement, _StridedShard):
            right = [d for d, axis in _plain(param.placements) if d > dim and axis == placement.dim]
            if placement.split_factor != math.prod(param.device_mesh.size(d) for d in right):
                break
            then.append((dim, placement.dim))
        elif type(placement) is Shard:
            first.append((dim, placement.dim))
        elif not isinstance(placement, Replicate):
            break
    else:
        return first + then
    raise UsageError(
        f"parameter '{name}' has placements {param.placements} on {param.device_mesh}: known "
        "layouts cut an axis by Shard on any mesh dimensions, tensor parallelism before FSDP2 "
        "(parallel=ddp|fsdp|hsdp|tp|fsdp_tp)"
    )


def _plain(placements: Any) -> list[tuple[int, int]]:
    from torch.distributed.tensor import Shard

    return [(d, p.dim) for d, p in enumerate(placements) if type(p) is Shard]


class Placement(NamedTuple):
    """How parameters lie that do not say so themselves: runs that a framework handed over."""

    ranks: Ranks
    layouts: Mapping[str, Layout]
