"""`python -m leapalign` is the command `leapalign`."""

from __future__ import annotations

from leapalign.cli import entry_point

if __name__ == "__main__":
    entry_point()
