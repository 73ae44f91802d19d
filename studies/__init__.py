"""Experiments behind docs/: each runs a sweep and reads it. `python -m geon.studies.<name>`."""
