"""The tiny run of tiny_run_fixtures.py as fixtures."""

from tiny_run_fixtures import *  # noqa: F403
