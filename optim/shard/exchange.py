"""Gather -> compute -> scatter, as the plan says, on process groups."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import UsageError
from geon.optim.shard.layout import ColShard, Layout, Replicated, RowShard
from geon.optim.shard.plan import Bucket, Matrix, Plan, Transport

Operands = tuple[Tensor, ...]
Compute = Callable[[Matrix, Operands], Tensor]
"""(matrix of a batch of equals, stacked operands) -> stacked results of the same shape."""


def locate(name: str, param: Tensor) -> tuple[Layout, str, dist.ProcessGroup | None]:
    """Layout of a parameter, the key of its process group, and the group.

    A plain tensor is whole on this rank. Vectors are seen as (1, n).

    Raises:
        UsageError: placements that no layout describes; names the parameter and the placements.
    """
    shape = _matrix_shape(tuple(param.shape))
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(param, DTensor):
        return Replicated(shape), "", None
    mesh, placements = param.device_mesh, param.placements
    sharded = [i for i, p in enumerate(placements) if not isinstance(p, Replicate)]
    if not sharded:
        return Replicated(shape), "", None
    if len(sharded) > 1 or type(placements[sharded[0]]) is not Shard:
        raise UsageError(
            f"parameter '{name}' has placements {placements} on mesh {mesh}: known layouts are "
            "replicated, Shard(0) and Shard(1) on one mesh dimension (parallel=ddp|fsdp|hsdp)"
        )
    axis, dim = sharded[0], placements[sharded[0]].dim  # type: ignore[attr-defined]
    key = mesh.mesh_dim_names[axis] if mesh.mesh_dim_names else f"mesh dimension {axis}"
    as_rows = dim == 0 and param.dim() == 2
    layout = (RowShard if as_rows else ColShard)(shape, mesh.size(axis))
    return layout, key, mesh.get_group(axis)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) < 2:
        return 1, shape[0] if shape else 1
    raise UsageError(f"a weight of shape {shape} is not a matrix")


def all_gather_single(output: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Gather equal pieces; torch 2.13 renamed the function."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, own, group=group)


class Exchange:
    """Runs a plan: the only place where optimizer tensors are sent.

    Attributes:
        plan: what is sent, decided beforehand.
        bytes_sent: bytes this rank has sent so far, counted where they are handed over.
        collectives: collectives issued so far.
    """

    def __init__(self, plan: Plan, groups: Mapping[str, dist.ProcessGroup | None]) -> None:
        self.plan = plan
        self.bytes_sent = 0
        self.collectives = 0
        self._groups = dict(groups)
        self._ranks = {
            key: 0 if group is None else dist.get_rank(group) for key, group in groups.items()
        }
        self._check_agreement()

    def rank_in(self, group: str) -> int:
        """This process's rank in the group of this key."""
        return self._ranks[group]

    def _check_agreement(self) -> None:
        """Compare plans across ranks before the first byte is sent.

        Raises:
            UsageError: on every rank, when any rank planned something else.
        """
        mine = int(self.plan.digest()[:15], 16)
        for key, group in self._groups.items():
            if group is None:
                continue
            bounds = torch.tensor([mine, -mine], device=_device_of(group))
            dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
            if bounds[0].item() != -bounds[1].item():
                raise UsageError(
                    f"ranks of '{key}' planned different exchanges (this one: {mine:x}): "
                    "they were started with different configs or models"
                )

    def run(
        self,
        operands: Callable[[Matrix], Operands],
        compute: Compute,
        finish: Callable[[Matrix, Tensor], Tensor],
        write: Callable[[Matrix, Tensor], None],
    ) -> None:
        """Step every matrix of the plan.

        operands: local pieces (own region) of the tensors a matrix's step needs.
        compute: the step on whole matrices, stacked over equal shapes, scales and rules.
        finish: what is done to one whole result, e.g. with state that each matrix has of its own.
        write: takes the own region of the result.
        """
        for bucket in self.plan.buckets:
            rank = self._ranks[bucket.group]
            local = bucket.transport is Transport.LOCAL
            # What this rank holds nothing of is stepped here only where everybody steps it.
            members = [m for m in bucket.matrices if not local or m.region(rank).numel]
            pieces = [operands(m) for m in members]
            whole = pieces if local else self._gather(bucket, rank, pieces)
            results = _batched(members, whole, compute)
            for matrix, result in zip(members, results, strict=True):
                done, region = finish(matrix, result), matrix.region(rank)
                if region.numel:
                    write(matrix, done if local else done[region.slices])

    def _gather(self, bucket: Bucket, rank: int, pieces: Sequence[Operands]) -> list[Operands]:
        """Make every operand of a bucket whole on every rank, in one collective.

        Equal contributions take all_gather; uneven ones take all_to_all with exact splits, so
        that nothing is padded.
        """
        group = self._groups[bucket.group]
        send = torch.cat([piece.reshape(-1) for operand in pieces for piece in operand])
        sizes = [bucket.elements(r) for r in range(bucket.ranks)]
        received = send.new_empty(sum(sizes))
        if len(set(sizes)) == 1:
            all_gather_single(received, send, group)
        else:
            dist.all_to_all_single(
                received, send.repeat(bucket.ranks), sizes, [sizes[rank]] * bucket.ranks, group
            )
        self.bytes_sent += send.numel() * send.element_size() * (bucket.ranks - 1)
        self.collectives += 1
        return _unpack(bucket, received)


def _unpack(bucket: Bucket, received: Tensor) -> list[Operands]:
    """Put each rank's pieces where they belong in the whole matrices."""
    whole = [tuple(received.new_empty(m.shape) for _ in range(m.operands)) for m in bucket.matrices]
    offset = 0
    for rank in range(bucket.ranks):
        for matrix, targets in zip(bucket.matrices, whole, strict=True):
            region = matrix.region(rank)
            if not region.numel:
                continue
            for target in targets:
                piece = received[offset : offset + region.numel]
                target[region.slices] = piece.view(region.shape)
                offset += region.numel
    return whole


def _batched(
    matrices: Sequence[Matrix], operands: Sequence[Operands], compute: Compute
) -> list[Tensor]:
    """Compute equal shapes and scales of one rule in one batch; results in the order given."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (matrix, tensors) in enumerate(zip(matrices, operands, strict=True)):
        alike[(matrix.rule, matrix.shape, matrix.scale, tensors[0].shape)].append(i)
    results: list[Tensor | None] = [None] * len(matrices)
    for members in alike.values():
        count = matrices[members[0]].operands
        stacked = tuple(torch.stack([operands[i][k] for i in members]) for k in range(count))
        for i, result in zip(members, compute(matrices[members[0]], stacked).unbind(), strict=True):
            results[i] = result
    return results  # type: ignore[return-value]


def _device_of(group: dist.ProcessGroup) -> torch.device:
    backend = dist.get_backend(group)
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
