"""Command lines besides train.py, each `python -m geon.scripts.<name>`."""

from geon.launch.extras import tell_missing

tell_missing()
