"""What the project measures of itself: speed, bytes, endurance. `python -m geon.benches.<name>`."""
