"""What a run needs, before anything is downloaded or loaded: `leapalign train RECIPE --dry-run` (docs/planning.md)."""
