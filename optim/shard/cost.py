"""Seconds of a step of buckets, and the least that any plan must send. No torch in here."""

from collections.abc import Iterable

from geon.optim.shard.layout import Holding


def seconds(phases: Iterable[tuple[float, float, float]]) -> float:
    """Seconds of a step of buckets (travel before, travel after, computation), one after another.

    The next bucket's first collective is under way while this one is computed.
    """
    total = hidden = 0.0
    for before, after, work in phases:
        total += max(0.0, before - hidden) + work + after
        hidden = work
    return total


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
