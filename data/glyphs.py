"""An image set that needs no download: letters of matplotlib's own fonts, distorted with a seed."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from geon.data.corpus import Corpus
from geon.data.images import RECORD, image_corpus
from geon.errors import UsageError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
FONTS = tuple(
    f"DejaVu{family}{style}"
    for family, styles in (
        ("Sans", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("SansMono", ("", "-Bold", "-Oblique", "-BoldOblique")),
        ("Serif", ("", "-Bold", "-Italic", "-BoldItalic")),
    )
    for style in styles
) + ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10")
CELL = 64
"""Pixels of a side that a letter is rendered in."""
_SEED = 20_26
_AT_ONCE = 2_000


@lru_cache(1)
def glyph_corpus(images: int, val_percent: float) -> Corpus:
    """Lower-case letters, 26 classes, on 3 x 32 x 32 pixels; the same set in every run.

    Each is one of 19 fonts, turned by up to 17 degrees, sheared, scaled and moved, bent by a smooth
    field, in a bright colour on a dark one, with a piece of a second letter beside it and noise.

    images: of both splits. val_percent: share of them that is tested on.

    Raises:
        UsageError: too few images.
    """
    test = round(images * val_percent / 100)
    if test < 1 or images - test < 2:
        raise UsageError(
            f"data.tokens {images} with data.val_percent {val_percent:g}: data=images draws so "
            "many images, of which at least two are trained on, and one is tested on"
        )
    letters = torch.from_numpy(rendered())
    rng = np.random.Generator(np.random.PCG64(_SEED))
    sizes = [min(_AT_ONCE, images - i) for i in range(0, images, _AT_ONCE)]
    records = np.concatenate([_draw(letters, size, rng) for size in sizes])
    name = f"{images:,} glyphs"
    return image_corpus(records[: images - test], records[images - test :], len(LETTERS), name)


def rendered() -> np.ndarray:
    """Every letter in every font: (fonts, letters, CELL, CELL) in [0, 1], in the middle."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    cells = np.zeros((len(FONTS), len(LETTERS), CELL, CELL), np.float32)
    for row, name in zip(cells, FONTS, strict=True):
        font = FT2Font(str(folder / f"{name}.ttf"))
        font.set_size(48, 72)
        for cell, letter in zip(row, LETTERS, strict=True):
            font.set_text(letter, 0.0)
            font.draw_glyphs_to_bitmap(antialiased=True)
            image = np.asarray(font.get_image(), np.float32)[:CELL, :CELL] / 255.0
            top, left = (CELL - image.shape[0]) // 2, (CELL - image.shape[1]) // 2
            cell[top : top + image.shape[0], left : left + image.shape[1]] = image
    return cells


def _draw(letters: torch.Tensor, count: int, rng: np.random.Generator) -> np.ndarray:
    """Records (count, 1 + pixels) uint8."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape)).astype(np.float32))

    def normal(scale: float, *shape: int) -> torch.Tensor:
        drawn = rng.standard_normal((count, *shape), dtype=np.float32)
        return torch.from_numpy(drawn) * scale

    fonts, classes, others = (
        torch.from_numpy(rng.integers(0, most, count))
        for most in (len(FONTS), len(LETTERS), len(LETTERS))
    )
    angle, shear, scale = uniform(-0.3, 0.3), uniform(-0.2, 0.2), 1 / uniform(1.0, 1.5)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    bent = torch.eye(2).repeat(count, 1, 1)
    bent[:, 0, 1] = shear
    moved = uniform(-0.12, 0.12, 2)
    matrix = (turn @ bent) * scale[:, None, None]
    affine = torch.cat([matrix, -matrix @ moved[:, :, None]], dim=2)
    grid = F.affine_grid(affine, [count, 1, 32, 32], align_corners=False)
    field = F.interpolate(normal(0.06, 2, 4, 4), (32, 32), mode="bicubic", align_corners=True)
    shapes = F.grid_sample(
        letters[fonts, classes][:, None], grid + field.permute(0, 2, 3, 1), align_corners=False
    )
    aside = affine.clone()
    side = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    aside[:, :, 2] += matrix[:, :, 0] * side[:, None] * 0.8
    beside = F.affine_grid(aside, [count, 1, 32, 32], align_corners=False)
    second = F.grid_sample(letters[fonts, others][:, None], beside, align_corners=False)
    ink, paper = uniform(0.4, 1, 3, 1, 1), uniform(0, 0.4, 3, 1, 1)
    image = paper + (ink - paper) * torch.maximum(shapes, 0.7 * second) + normal(0.12, 3, 32, 32)
    pixels = image.clamp(0, 1).mul(255).round().to(torch.uint8).view(count, RECORD - 1).numpy()
    return np.concatenate([classes.numpy().astype(np.uint8)[:, None], pixels], axis=1)
