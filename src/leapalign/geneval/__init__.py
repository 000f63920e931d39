"""GenEval (arXiv 2310.11513): its wording and its rules."""
