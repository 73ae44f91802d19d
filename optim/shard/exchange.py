"""Runs a plan: the only place where optimizer tensors are sent.

A bucket is one `all_to_all_single` of bytes before its computation and one after it, with exact
splits. While a bucket is computed, the next one's first collective and the last one's second are
under way. What is sent, computed and written is the transports' business.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from geon.errors import ExchangeError, UsageError
from geon.optim.shard.plan import Bucket, Plan
from geon.optim.shard.ranks import Ranks
from geon.optim.shard.transports import Job, Letters, Message, Transport, Work
from geon.optim.shard.wire import pack, sizes, unpack


@dataclass
class OwnBucket:
    """A bucket as one rank sees it, worked out once.

    Attributes:
        jobs: by transport.
        sends, gets: messages of this rank each way, before and after the computation, in the order
            of the other rank and then of the bucket: as both sides pack.
    """

    index: int
    bucket: Bucket
    jobs: list[tuple[Transport, list[Job]]]
    sends: tuple[list[tuple[Job, Message]], list[tuple[Job, Message]]]
    gets: tuple[list[tuple[Job, Message]], list[tuple[Job, Message]]]

    @classmethod
    def of(cls, index: int, bucket: Bucket, rank: int) -> "OwnBucket":
        """What one rank sends, gets and computes in a bucket."""
        by: dict[Transport, list[Job]] = {}
        sends: tuple[list[tuple[Job, Message]], ...] = ([], [])
        gets: tuple[list[tuple[Job, Message]], ...] = ([], [])
        for job in bucket.jobs:
            by.setdefault(job.transport, []).append(job)
            for way, messages in enumerate((job.down, job.up)):
                sends[way].extend((job, m) for m in messages if m.sender == rank)
                gets[way].extend((job, m) for m in messages if m.receiver == rank)
        for way in (0, 1):
            sends[way].sort(key=lambda pair: pair[1].receiver)
            gets[way].sort(key=lambda pair: pair[1].sender)
        return cls(index, bucket, list(by.items()), (sends[0], sends[1]), (gets[0], gets[1]))


@dataclass
class _UnderWay:
    """A bucket between its first phase and its last.

    Attributes:
        own: what this rank sent to itself: it comes in with what others send.
        handle: the collective that is under way.
    """

    bucket: OwnBucket
    own: Letters = field(default_factory=dict)
    handle: "_Handle | None" = None


@dataclass
class _Handle:
    work: dist.Work | None
    received: Tensor
    sent: Tensor
    """Bytes that are sent, kept until the collective is over."""


class Exchange:
    """Runs a plan on this rank, step by step.

    Attributes:
        plan: what is sent, decided beforehand.
        ranks: who takes part.
        bytes_sent: bytes this rank has sent so far, counted where they are handed over.
        collectives: collectives issued so far.
    """

    def __init__(
        self, plan: Plan, ranks: Ranks | None = None, before: "Exchange | None" = None
    ) -> None:
        """Prepare a plan; `before` is the exchange that this one replaces: its counts go on."""
        self.plan = plan
        self.ranks = ranks or Ranks()
        self.bytes_sent: int = before.bytes_sent if before else 0
        self.collectives: int = before.collectives if before else 0
        if plan.jobs and plan.ranks != self.ranks.size:
            raise UsageError(
                f"the plan is for {plan.ranks} ranks, but {self.ranks.size} step together"
            )
        self._check_agreement()
        rank = self.ranks.rank
        self._buckets = [OwnBucket.of(i, bucket, rank) for i, bucket in enumerate(plan.buckets)]

    def _check_agreement(self) -> None:
        """Compare plans across ranks before the first byte is sent.

        Raises:
            UsageError: on every rank, naming the first parameter that they planned differently.
        """
        if self.ranks.group is None or self.ranks.size == 1:
            return
        mine = int(self.plan.digest[:15], 16)
        bounds = torch.tensor([mine, -mine], device=self.ranks.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.ranks.group)
        if bounds[0].item() == -bounds[1].item():
            return
        everyone: list[dict[str, str]] = [{}] * self.ranks.size
        dist.all_gather_object(everyone, self.plan.digests(), group=self.ranks.group)
        names = list(dict.fromkeys(name for one in everyone for name in one))
        first = next((n for n in names if len({one.get(n) for one in everyone}) > 1), names[0])
        odd = [r for r, one in enumerate(everyone) if one.get(first) != everyone[0].get(first)]
        raise UsageError(
            f"ranks planned different exchanges: parameter '{first}' differs on rank "
            f"{', '.join(map(str, odd)) or '?'} from rank 0 (this one is {self.ranks.rank}); start "
            "all ranks with one config, model and shard.* settings"
        )

    def run(
        self,
        work: Work,
        params: Collection[str],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Step the buckets that hold a matrix of the given parameters.

        meanwhile: called once, while the first bucket travels.
        """
        landing: _UnderWay | None = None
        buckets = [b for b in self._buckets if not b.bucket.params.isdisjoint(params)]
        current = self._depart(buckets[0], work) if buckets else None
        if meanwhile is not None:
            meanwhile()
        for following in [*buckets[1:], None] if buckets else []:
            assert current is not None
            inbox = self._receive(current, 0)
            ahead = self._depart(following, work) if following is not None else None
            self._compute(current, inbox, work)
            if landing is not None:
                self._land(landing, work)
            landing, current = current, ahead
        if landing is not None:
            self._land(landing, work)

    # The three phases of a bucket.

    def _depart(self, bucket: OwnBucket, work: Work) -> _UnderWay:
        outbox: Letters = {}
        for transport, jobs in bucket.jobs:
            if transport.owned:
                outbox |= transport.depart(jobs, work)
        return self._send(_UnderWay(bucket), 0, outbox)

    def _compute(self, current: _UnderWay, inbox: Letters, work: Work) -> None:
        outbox: Letters = {}
        for transport, jobs in current.bucket.jobs:
            outbox |= transport.compute(jobs, work, inbox)
        self._send(current, 1, outbox)

    def _land(self, current: _UnderWay, work: Work) -> None:
        inbox = self._receive(current, 1)
        for transport, jobs in current.bucket.jobs:
            if transport.owned:
                transport.land(jobs, work, inbox)

    # Sending.

    def _send(self, current: _UnderWay, way: int, outbox: Letters) -> _UnderWay:
        """Start one all_to_all_single with exact splits; keep what is for this rank itself."""
        bucket, rank = current.bucket, self.ranks.rank
        current.own = {key: tensors for key, tensors in outbox.items() if key[1] == rank}
        if not (bucket.bucket.gathers, bucket.bucket.scatters)[way]:
            return current
        sends, gets, size = bucket.sends[way], bucket.gets[way], self.ranks.size
        words = [pair for _, message in sends for pair in message.words]
        tensors = [t for job, message in sends for t in outbox[job, message.receiver]]
        sent = pack(tensors, words, self.ranks.device)
        send_sizes = sizes(((m.receiver, m.size) for _, m in sends), size)
        get_sizes = sizes(((m.sender, m.size) for _, m in gets), size)
        received = torch.empty(sum(get_sizes), dtype=torch.uint8, device=self.ranks.device)
        self.bytes_sent += sent.numel()
        self.collectives += 1
        try:
            handle = dist.all_to_all_single(
                received, sent, get_sizes, send_sizes, group=self.ranks.group, async_op=True
            )
        except RuntimeError as error:
            raise self._failure(bucket, way, error) from error
        current.handle = _Handle(handle, received, sent)
        return current

    def _receive(self, current: _UnderWay, way: int) -> Letters:
        """Wait for a collective; return what it brought, and what this rank kept for itself."""
        handle, current.handle = current.handle, None
        inbox: Letters = dict(current.own)
        if handle is None:
            return inbox
        try:
            if handle.work is not None:
                handle.work.wait()
        except RuntimeError as error:
            raise self._failure(current.bucket, way, error) from error
        gets = current.bucket.gets[way]
        tensors = unpack(handle.received, [pair for _, m in gets for pair in m.words])
        for job, message in gets:
            inbox[job, message.sender] = [next(tensors) for _ in message.words]
        return inbox

    def _failure(self, bucket: OwnBucket, way: int, error: Exception) -> ExchangeError:
        reason, phase = str(error).strip().splitlines()[0], ("gather", "scatter")[way]
        return ExchangeError(
            f"rank {self.ranks.rank}: the {phase} (all_to_all_single) of bucket {bucket.index} of "
            f"{len(self.plan.buckets)} ({bucket.bucket.describe()}) failed: another rank ended, or "
            f"took longer than parallel.timeout_seconds. {reason}"
        )
