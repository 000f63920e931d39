"""GenEval (arXiv 2310.11513): wording and rules."""
