"""What a plan costs in seconds, and the least that any plan must send. No torch in here."""

from dataclasses import dataclass

from geon.optim.shard.layout import Holding


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank; rough ones suffice to choose transports.

    Attributes:
        flops: FLOP/s of batched fp32 products.
        half_flops: FLOP/s of batched bf16 products.
        bandwidth: bytes/s that a rank sends.
        latency: seconds of an empty collective.
    """

    flops: float
    half_flops: float
    bandwidth: float
    latency: float


# Rough: one core of a server CPU over gloo, as scripts/bench_sharding.py measured it, and a data
# centre GPU over NVLink from its data sheet, halved. shard.tflops and its neighbours set yours.
MACHINES = {
    "cpu": Machine(flops=5e10, half_flops=1.5e11, bandwidth=4e8, latency=1e-3),
    "cuda": Machine(flops=3e13, half_flops=4e14, bandwidth=1e11, latency=5e-5),
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
