"""Momenta that rest in bf16 are rounded by chance, so that on average they are what fp32 holds.

Rounded to nearest, an average stays where it is as long as each gradient would move it by less than
half of its last digit. Here a number between two of bf16 becomes the upper one as often as it lies
near it: nothing is lost on average, whatever the size of the increments.

Chance is a hash of the parameter's name, the row and the column in the whole parameter, and how
often its momentum was rounded before. So it takes nothing from torch's generators, and is the same
after a resume, in every layout over ranks and on every device. Nothing in it waits for the device,
and the count is a tensor there, so a captured graph draws anew each time that it is replayed.
"""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from geon.optim.shard import Region
from geon.optim.tree import bare

DRAWS = "draws"
"""Key of the state that counts roundings, from a start of the parameter's own (`first_draw`)."""
MOST = 2**24
"""Entries that are rounded at once, unless one box has more: what chance takes is 4 bytes each."""
_WORD = 0xFFFFFFFF
_COLUMNS = 1 << 31
"""What tells a column from the row of its number."""
_NAN = 0x7FC00000
"""Bits of a nan, above those of every number. A GPU has larger ones, which would run over to -0."""


class Box(NamedTuple):
    """A box of a momentum that is about to be rounded.

    Attributes:
        draws: the parameter's count of roundings, before this one.
        region: of the parameter, seen as a matrix.
        average: (rows, cols), fp32.
        held: (rows, cols), bf16: takes the rounded average.
    """

    draws: Tensor
    region: Region
    average: Tensor
    held: Tensor


def first_draw(name: str, device: torch.device) -> Tensor:
    """The count of a momentum that was not rounded yet, int64: a hash of the name times 2^31."""
    return torch.full((), crc32(bare(name).encode()) << 31, dtype=torch.int64, device=device)


def round_by_chance(boxes: Sequence[Box]) -> None:
    """Leave averages in bf16, rounded up or down with odds that make them right on average.

    Numbers of bf16 stay as they are; infinities and nan too.
    """
    batches = _batches(boxes)
    for batch, (rows, cols) in zip(batches, _words(batches), strict=True):
        # The upper half of a product of two odd numbers, each of all 2^31: uniform, and of any
        # three entries independent. A sum would be cheaper, and a matrix of low rank, which a polar
        # factor would lift above everything else. Products of int32 wrap around.
        chance = rows[:, :, None] * cols[:, None, :]
        chance.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        bits = [box.average.view(torch.int32) for box in batch]
        torch._foreach_clamp_max_(bits, _NAN)
        torch._foreach_add_(list(chance.unbind()), bits)
        chance.bitwise_and_(~0xFFFF)
        rounded = chance.view(torch.float32)
        torch._foreach_copy_([box.held for box in batch], list(rounded.unbind()))


def _batches(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes of one shape together, as many as MOST lets."""
    batches: list[list[Box]] = []
    last: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        shape = box.region.shape
        batch = last.get(shape)
        if batch is None or (len(batch) + 1) * box.region.numel > MOST:
            batch = last[shape] = []
            batches.append(batch)
        batch.append(box)
    return batches


def _words(batches: Sequence[Sequence[Box]]) -> list[tuple[Tensor, Tensor]]:
    """Odd int32 hashes of the rows (boxes, rows) and columns (boxes, cols) of each batch."""
    places, draws, shapes = list[Tensor](), list[Tensor](), list[tuple[int, int]]()
    known: dict[tuple[int, int], Tensor] = {}
    for batch in batches:
        for axis in (0, 1):
            for box in batch:
                start, stop = (box.region.rows, box.region.cols)[axis]
                span = start + axis * _COLUMNS, stop + axis * _COLUMNS
                if span not in known:
                    known[span] = torch.arange(*span, device=box.held.device)
                places.append(known[span])
                draws.append(box.draws.expand(stop - start))
            shapes.append((len(batch), stop - start))
    if not places:
        return []
    drawn = torch.cat(draws)
    keys = _mixed(_mixed(drawn & _WORD) ^ (drawn >> 32))
    words = (_mixed(_mixed(torch.cat(places)) ^ keys) | 1).to(torch.int32)
    cut = torch.split(words, [count * length for count, length in shapes])
    found = [own.view(shape) for own, shape in zip(cut, shapes, strict=True)]
    return list(zip(found[::2], found[1::2], strict=True))


def _mixed(words: Tensor) -> Tensor:
    """Hash 32-bit words that int64 holds: each bit of a word changes half of the bits of its hash.

    The factor is below 2^31, so that no product leaves int64.
    """
    for _ in range(2):
        words = ((words ^ (words >> 16)) * 0x45D9F3B) & _WORD
    return words ^ (words >> 16)
