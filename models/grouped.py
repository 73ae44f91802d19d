"""Attention of grouped queries: several heads of queries read one of keys and values."""

from torch import Tensor, nn

from geon.models.cache import BlockCache
from geon.models.layers import Norm, attend, rotate


class Queries(nn.Module):
    """The q, k and v projections, of which k and v may have fewer heads."""

    def __init__(self, d_model: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.q = nn.Linear(d_model, heads * head_dim, bias=False)
        self.k, self.v = (nn.Linear(d_model, kv_heads * head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> three of (B, T, heads K)."""
        return self.q(x), self.k(x), self.v(x)


class GroupedAttention(nn.Module):
    """Attention of grouped queries with rotary positions.

    qk_eps: of an RMSNorm of each head's queries and keys, whose gains all heads share; None has no
    such norm.
    """

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, qk_eps: float | None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.proj_in = Queries(d_model, heads, kv_heads, head_dim)
        self.proj_out = nn.Linear(heads * head_dim, d_model, bias=False)
        self.qk_norm = qk_eps is not None
        if qk_eps is not None:
            self.q_norm, self.k_norm = (Norm(head_dim, qk_eps) for _ in range(2))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.proj_out((past.attend if past else attend)(q, k, v))
