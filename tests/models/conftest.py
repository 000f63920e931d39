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


@pytest.fixture(scope="session")
def sd3_m_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.sd3_pipeline(dual=(), qk_norm=None), tmp_path_factory.mktemp("sd3-m"))


@pytest.fixture(scope="session")
def sd35_l_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.sd3_pipeline(dual=()), tmp_path_factory.mktemp("sd35-l"))


@pytest.fixture(scope="session")
def flux2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.flux2_pipeline(), tmp_path_factory.mktemp("flux2"))


@pytest.fixture(scope="session")
def flux2_distilled_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.flux2_pipeline(distilled=True), tmp_path_factory.mktemp("flux2-distilled"))


@pytest.fixture(scope="session")
def qwen_image_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.qwen_image_pipeline(), tmp_path_factory.mktemp("qwen-image"))


@pytest.fixture(scope="session")
def z_image_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.z_image_pipeline(), tmp_path_factory.mktemp("z-image"))
