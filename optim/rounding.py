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

COUNT = "step"
"""Key of the state that counts roundings: a number of no dimensions, in fp32 like torch's own."""
_WORD = 0xFFFFFFFF
_NAN = 0x7FC00000
"""Bits of a nan, above those of every number. A GPU has larger ones, which would run over to -0."""


class Box(NamedTuple):
    """A box of a momentum that is about to be rounded.

    Attributes:
        name: of the parameter.
        times: how often the momentum was rounded before; no dimensions.
        region: of the parameter, seen as a matrix.
        average: (rows, cols), fp32.
        held: (rows, cols), bf16: takes the rounded average.
    """

    name: str
    times: Tensor
    region: Region
    average: Tensor
    held: Tensor


def round_by_chance(boxes: Sequence[Box]) -> None:
    """Leave averages in bf16, rounded up or down with odds that make them right on average.

    Numbers of bf16 stay as they are; infinities and nan too.
    """
    words = _words(boxes)
    for box, rows, cols in zip(boxes, words[::2], words[1::2], strict=True):
        # The upper half of a product of two odd numbers, each of all 2^31: uniform, and of any
        # three entries independent. A sum would be cheaper, and a matrix of low rank, which a polar
        # factor would lift above everything else. Products of int32 wrap around.
        chance = rows[:, None] * cols
        chance.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        chance.add_(box.average.view(torch.int32).clamp_(max=_NAN)).bitwise_and_(~0xFFFF)
        box.held.copy_(chance.view(torch.float32))


def _words(boxes: Sequence[Box]) -> list[Tensor]:
    """Odd int32 hashes of the rows of each box, and of its columns, one after the other."""
    if not boxes:
        return []
    places, times = list[Tensor](), list[Tensor]()
    for box in boxes:
        for axis, (start, stop) in zip("rc", (box.region.rows, box.region.cols), strict=True):
            seed = crc32(f"{axis} {bare(box.name)}".encode())
            places.append(torch.arange(seed + start, seed + stop, device=box.held.device))
            times.append(box.times.expand(stop - start))
    mixed = _mixed(_mixed(torch.cat(places) & _WORD) ^ _mixed(torch.cat(times).long()))
    lengths = [len(place) for place in places]
    return list(torch.split((mixed | 1).to(torch.int32), lengths))


def _mixed(words: Tensor) -> Tensor:
    """Hash 32-bit words that int64 holds: each bit of a word changes half of the bits of its hash.

    The factor is below 2^31, so that no product leaves int64.
    """
    for _ in range(2):
        words = ((words ^ (words >> 16)) * 0x45D9F3B) & _WORD
    return words ^ (words >> 16)
