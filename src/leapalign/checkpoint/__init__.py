"""A run's checkpoints: what they hold, how they are written and read."""
