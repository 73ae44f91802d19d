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

    A rank that stores some rows of X must put out the same rows of polar(X). With its own rows
    fixed, these range over a set whose dimension is the number of words it must receive, and what
    all ranks receive all ranks send. For k of l rows along the long side, and short side s,
    O_r = X_r (X^T X)^(-1/2), where the rest of the matrix enters by its Gram alone:

        k s - k (k - 1) / 2 for k <= s, s (s + 1) / 2 for more.

    For k of s rows along the short side, O_r O_r^T = I and O_r X_r^T is symmetric:

        k l - k^2, or (s - k) l - (s - k) (s - k - 1) / 2 if that is less.

    A box that spans neither side is bounded by its entries alone. tests/optim/test_shard_cost.py
    computes the dimensions as ranks of Jacobians.
    """
    short, long = sorted(held.box.shape)
    tall = held.box.shape[0] >= held.box.shape[1]
    received = 0.0
    for own, words in zip(held.pieces, held.words, strict=True):
        if not own or words == short * long:
            continue
        if len(own) > 1:
            return None
        sides = own[0].region.shape if tall else own[0].region.shape[::-1]
        along, across = sides
        if across == short:
            received += _long_side(along, short)
        elif along == long:
            rest = short - across
            received += min(across * long - across**2, rest * long - rest * (rest - 1) / 2)
        else:
            received += min(words, _long_side(along, short))
    return received / len(held.pieces)


def _long_side(rows: int, short: int) -> float:
    k = min(rows, short)
    return k * short - k * (k - 1) / 2
