"""LeapAlign: align flow-matching generators with reward gradients (arXiv 2604.15311)."""
