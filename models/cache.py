"""Keys and values of what a model has read, so that the next token runs the model once."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Cache:
    """What a batch of rows has left in every block; shorter rows are padded on the left.

    Attributes:
        time: columns read so far.
        starts: first column of each row that is no padding (rows,); None where none is padded.
        blocks: one `BlockCache` a block.
    """

    def __init__(self, n_layer: int, context: int, starts: Tensor | None = None) -> None:
        """context: most columns that are read."""
        self.time, self.context, self.starts = 0, context, starts
        self.blocks = [BlockCache(self) for _ in range(n_layer)]
        self._mask: Tensor | None = None

    def mask(self, time: int) -> Tensor | None:
        """Keys that the next `time` columns see: (rows, 1, time, keys), made once for all blocks.

        Padding sees itself, because a softmax over nothing is not a number; nothing sees padding.

        Returns: None where a single column sees all, or a first pass what is before each column.
        """
        if self.starts is None and (time == 1 or self.time == 0):
            return None
        if self._mask is None:
            starts = self.starts if self.starts is not None else torch.zeros(1, dtype=torch.long)
            device = starts.device
            queries = torch.arange(self.time, self.time + time, device=device)[:, None]
            keys = torch.arange(self.time + time, device=device)
            seen = (keys <= queries) & (keys >= starts[:, None, None])
            self._mask = (seen | (keys == queries))[:, None]
        return self._mask

    def columns(self, table: tuple[Tensor, ...], time: int) -> tuple[Tensor, ...]:
        """Rows of tables over all columns for the next `time` of them."""
        return tuple(rows[self.time : self.time + time] for rows in table)

    def advance(self, time: int) -> None:
        """Count columns that all blocks have read."""
        self.time += time
        self._mask = None


class BlockCache:
    """Keys and values of one block, each (rows, heads, context, K)."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._keys = self._values = torch.empty(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention of new columns (B, T, H, K) to all columns so far; returns (B, T, H K)."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        cache, time = self._cache, q.shape[2]
        if cache.time == 0:
            size = (*k.shape[:2], cache.context, k.shape[3])
            self._keys, self._values = k.new_empty(size), v.new_empty(size)
        end = cache.time + time
        self._keys[:, :, cache.time : end] = k
        self._values[:, :, cache.time : end] = v
        mask = cache.mask(time)
        mixed = F.scaled_dot_product_attention(
            q,
            self._keys[:, :, :end],
            self._values[:, :, :end],
            attn_mask=mask,
            is_causal=mask is None and time > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return mixed.transpose(1, 2).flatten(2)
