"""The tiny pipeline folders of pipeline_folders.py as fixtures."""

from pipeline_folders import *  # noqa: F403
