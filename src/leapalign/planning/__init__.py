"""Plan a run without downloading or loading weights: `leapalign train RECIPE --dry-run` (docs/planning.md)."""
