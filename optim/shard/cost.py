"""What a step costs in seconds, and the least that any plan must send. No torch in here.

One model serves the planner, which prices kinds of matrices, and the plan, which prints seconds:
`Machine.work` for what is computed and `Machine.travel` for what is sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from geon.optim.shard.layout import Holding


@dataclass(frozen=True)
class Bytes:
    """What travels, by the network that it crosses.

    Attributes:
        near: bytes between ranks of one node, or of a network of one level.
        far: bytes between ranks of two nodes.
    """

    near: int = 0
    far: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.near + other.near, self.far + other.far)

    @property
    def total(self) -> int:
        """Bytes over both networks together."""
        return self.near + self.far


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank; rough ones suffice to choose transports.

    Attributes:
        flops: FLOP/s of batched fp32 products.
        half_flops: FLOP/s of batched bf16 products.
        bandwidth: bytes/s that a rank sends.
        latency: seconds of an empty collective.
        node: consecutive ranks that share a node; 0 for a network of one level.
        far_bandwidth: bytes/s that a rank sends to other nodes; not read where node is 0.
        device: kind of device that it has, which decides what is in bf16.
    """

    flops: float
    half_flops: float
    bandwidth: float
    latency: float
    node: int = 0
    far_bandwidth: float = 0.0
    device: str = "cuda"

    def crossing(self, sender: int, receiver: int, size: int) -> Bytes:
        """Bytes of one message, by the network that it crosses."""
        if self.node and sender // self.node != receiver // self.node:
            return Bytes(far=size)
        return Bytes(near=size)

    def travel(self, sent: Bytes) -> float:
        """Seconds for what one rank sends, or receives, without the latency of the collective."""
        far = sent.far / self.far_bandwidth if sent.far else 0.0
        return sent.near / self.bandwidth + far

    def work(self, flops: float, half_flops: float = 0.0) -> float:
        """Seconds for what one rank computes, in fp32 and in bf16."""
        return flops / self.flops + half_flops / self.half_flops


def seconds(phases: Iterable[tuple[float, float, float]]) -> float:
    """Seconds of a step of buckets (travel before, travel after, computation), one after another.

    The next bucket's first collective is under way while this one is computed.
    """
    total = hidden = 0.0
    for before, after, work in phases:
        total += max(0.0, before - hidden) + work + after
        hidden = work
    return total


_GPU = Machine(flops=3e13, half_flops=4e14, bandwidth=1e11, latency=5e-5)

# cpu: one core of a server CPU over gloo, as scripts/bench_sharding.py measured it. The others: a
# data centre GPU over NVLink, and nodes of eight of them joined by one 400 Gb/s InfiniBand port a
# GPU, or by 100 Gb/s Ethernet a node, from data sheets, halved. shard.tflops and its neighbours
# set yours.
MACHINES = {
    "cpu": Machine(flops=5e10, half_flops=1.5e11, bandwidth=4e8, latency=1e-3, device="cpu"),
    "cuda": _GPU,
    "cuda_infiniband": replace(_GPU, node=8, far_bandwidth=2.5e10, latency=1e-4),
    "cuda_ethernet": replace(_GPU, node=8, far_bandwidth=8e8, latency=2e-4),
}


def lower_bound_words(held: Holding) -> float | None:
    """Least words that a rank must send on average for exact polar factors; None if not known.

    A rank that stores k of the rows of X must put out the same rows of polar(X). With its own rows
    fixed, these range over a set whose dimension is the number of words that it must receive; and
    what all ranks receive, all ranks send. `along_long` and `along_short` are the dimensions. A
    box that spans neither side is bounded by its entries, and by those of the rows it lies in.
    tests/optim/test_shard_cost.py finds the same dimensions as ranks of Jacobians.
    """
    short, long = sorted(held.box.shape)
    tall = held.box.shape[0] >= held.box.shape[1]
    received = 0.0
    for own, words in zip(held.pieces, held.words, strict=True):
        if not own or words == short * long:
            continue
        if len(own) > 1:
            return None
        along, across = own[0].region.shape if tall else own[0].region.shape[::-1]
        if across == short:
            received += along_long(along, short, long)
        elif along == long:
            received += along_short(across, short, long)
        else:
            received += min(words, along_long(along, short, long))
    return received / len(held.pieces)


def along_long(k: int, short: int, long: int) -> int:
    """Words for k of `long` rows: O = X_k Q, Q = (X^T X)^(-1/2), where the others enter by a Gram.

    k s - k (k - 1) / 2 for k <= s, s (s + 1) / 2 for more; when fewer than s other rows are left,
    their Gram is of low rank, which takes off what a symmetric matrix of the missing size has.
    """
    most = min(k, short)
    missing = max(0, short - (long - k))
    return most * short - most * (most - 1) // 2 - missing * (missing + 1) // 2


def along_short(k: int, short: int, long: int) -> int:
    """Words for k of `short` rows: O O^T = I and O X_k^T is symmetric, which leaves k l - k^2.

    What X_k has beyond O comes from the other rows: if they are fewer than k, its rank is theirs.
    """
    rest = short - k
    return k * long - k * k - max(0, k - rest) * max(0, long - k - rest)
