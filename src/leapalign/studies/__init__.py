"""Complete experiments: training, evaluation and report."""
