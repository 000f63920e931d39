"""Tiny pipeline folders, written once a session; tests that spoil one work on a copy."""

from __future__ import annotations

import pytest

import tiny_pipelines as tiny


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.sd3_pipeline(), tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def sd3_without_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.sd3_pipeline(with_t5=False), tmp_path_factory.mktemp("sd3-without-t5"))


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.flux_pipeline(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.flux_pipeline(guidance_embeds=False), tmp_path_factory.mktemp("schnell"))
