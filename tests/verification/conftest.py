"""Tiny folders of pipelines, written once; tests that spoil one work on a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_pipelines as tiny


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save(tiny.sd3_pipeline(with_t5=False), tmp_path_factory.mktemp("sd3")))


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.save(tiny.flux_pipeline(), tmp_path_factory.mktemp("flux")))
