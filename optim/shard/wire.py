"""Tensors to bytes and back: what travels is one buffer of bytes each way."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Words = Sequence[tuple[int, int]]
"""(count, bytes of one) of each tensor in a buffer, in order."""
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


def pack(tensors: Sequence[Tensor], words: Words, device: torch.device) -> Tensor:
    """All tensors, rounded to the width of their words, in one buffer of bytes."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8, device=device)
    flat = [tensor.reshape(-1) for tensor in tensors]
    widths = {width for _, width in words}
    if len(widths) == 1:  # one conversion instead of many
        return torch.cat(flat).to(_DTYPES[widths.pop()]).view(torch.uint8)
    return torch.cat(
        [
            tensor.to(_DTYPES[width]).contiguous().view(torch.uint8)
            for tensor, (_, width) in zip(flat, words, strict=True)
        ]
    )


def unpack(received: Tensor, words: Words) -> Iterator[Tensor]:
    """The tensors in a buffer of bytes, flat and in fp32."""
    widths, at = {width for _, width in words}, 0
    if len(widths) == 1:
        whole = received.view(_DTYPES[widths.pop()]).float()
        for count, _ in words:
            yield whole[at : at + count]
            at += count
        return
    for count, width in words:
        part = received[at : at + count * width].clone()  # aligned by the copy
        yield part.view(_DTYPES[width]).float()
        at += count * width


def sizes(counts: Iterable[tuple[int, int]], ranks: int) -> list[int]:
    """Bytes for each rank, added up from pairs (rank, bytes)."""
    found = [0] * ranks
    for rank, size in counts:
        found[rank] += size
    return found
