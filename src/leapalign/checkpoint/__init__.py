"""A run's checkpoints: contents, writing, reading."""
