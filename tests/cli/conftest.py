"""Folders that a test may damage."""

from __future__ import annotations

import shutil

import pytest

import tiny_pipelines
from tiny_clip import write_tiny_clip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    tiny_pipelines.save(tiny_pipelines.sd3_pipeline(with_t5=False), folder / "sd3")
    write_tiny_clip(folder / "clip")
    return folder


@pytest.fixture
def folder(given, tmp_path, monkeypatch):
    """sd3/ and clip/, which the test may damage; the working folder."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
