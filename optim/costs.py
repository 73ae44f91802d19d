"""What a computation takes, whatever the machine: products by arithmetic, memory, operators.

A machine's speeds make seconds of it (optim/shard/machine.py). No torch in here.
"""

from dataclasses import dataclass

PASSES = {"fp32": 1, "bf16": 1, "bf16x3": 3}
"""Arithmetic of a product -> hardware products that it takes; the words of `Precision`."""


@dataclass(frozen=True)
class Cost:
    """What a step, or a part of one, takes.

    Attributes:
        fp32, bf16, bf16x3: FLOPs of products in this arithmetic, the passes of bf16x3 not counted.
        words: of 4 bytes, read and written by everything but products.
        operators: kernels that the host issues; a batch of equal shapes takes as many as one
            matrix.
    """

    fp32: int = 0
    bf16: int = 0
    bf16x3: int = 0
    words: int = 0
    operators: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.fp32 + other.fp32,
            self.bf16 + other.bf16,
            self.bf16x3 + other.bf16x3,
            self.words + other.words,
            self.operators + other.operators,
        )

    def batch(self, count: float) -> "Cost":
        """Cost of `count` matrices in one batch, or of a share of one."""
        return Cost(
            round(count * self.fp32),
            round(count * self.bf16),
            round(count * self.bf16x3),
            round(count * self.words),
            self.operators,
        )

    def times(self, count: int) -> "Cost":
        """Cost of doing the same `count` times, one after another."""
        scaled = self.batch(count)
        return Cost(scaled.fp32, scaled.bf16, scaled.bf16x3, scaled.words, count * self.operators)

    @property
    def flops(self) -> int:
        """FLOPs in all, every pass of bf16x3 counted."""
        return sum(passes * getattr(self, name) for name, passes in PASSES.items())


def products(flops: float, arithmetic: str, words: float = 0, operators: int = 0) -> Cost:
    """Cost of products in one arithmetic, and of what is done beside them."""
    found = dict.fromkeys(PASSES, 0) | {arithmetic: round(flops)}
    return Cost(**found, words=round(words), operators=operators)
