"""Experiments behind docs/: each runs a sweep and reads it. `python -m geon.studies.<name>`."""

from geon.launch.extras import tell_missing

tell_missing()
