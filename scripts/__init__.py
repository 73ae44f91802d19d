"""Command lines besides train.py, each `python -m geon.scripts.<name>`."""
