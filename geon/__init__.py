"""Geon: train language models with optimizers that know the geometry of each weight.

In a checkout the folders of the repository root are this package's subpackages
(`geon.optim` is `optim/`), so a fresh clone runs without being installed.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "optim").is_dir():  # an installed package holds its folders itself
    __path__.append(str(_here.parent))
