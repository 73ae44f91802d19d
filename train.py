"""Train a language model: `python train.py experiment=first_run`, or under torchrun.

The program is geon/train.py, which an installed package has, too: `python -m geon.train`.
"""

import sys

from geon.train import start

if __name__ == "__main__":
    start(sys.argv[1:])
