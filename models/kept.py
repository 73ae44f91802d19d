"""Bytes that autograd keeps of a decoder's forward pass, weights apart; eager and compiled alike.

The compiler's partitioner recomputes products with rotary tables and sums of the residual stream,
as autograd's formulas do not need them either; it keeps all inputs of matrix products, because they
must exist in the backward pass.
"""

from dataclasses import dataclass

FP32 = 4


@dataclass(frozen=True)
class Pass:
    """A forward pass of a rank, as far as bytes go.

    Attributes:
        tokens: of a micro-batch.
        context: tokens of a sequence.
        size: bytes of a number in the model's arithmetic.
        wide: bytes of a number that an RMSNorm keeps: its input. torch's fused norm on a GPU keeps
            it as it is, and so do compiled ones; on a CPU the eager one keeps an fp32 copy.
        tensor: ranks of tensor parallelism.
        composed: whether attention is composed of products (models/layers.py).
        eager_cpu: whether norms are made of several operators; those with gains then keep, in fp32,
            their output before the gains.
    """

    tokens: int
    context: int
    size: int
    wide: int
    tensor: int
    composed: bool
    eager_cpu: bool

    def norm(self, width: int, gains: bool) -> int:
        """Of an RMSNorm and a token: its input, a factor, and its output as a product's input."""
        return width * (self.wide + self.size + FP32 * (gains and self.eager_cpu)) + FP32

    def heads(self, count: int) -> int:
        """Of attention and a token: its odds in each of `count` heads, or their log-sum-exp."""
        return count * (self.context * self.size if self.composed else FP32)
