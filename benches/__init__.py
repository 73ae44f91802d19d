"""What the project measures of itself: speed, bytes, endurance. `python -m geon.benches.<name>`."""

from geon.launch.extras import tell_missing

tell_missing()
