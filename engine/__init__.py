"""The training engine: from a checked config to a finished run folder."""
