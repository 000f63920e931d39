"""Tiny pipeline folders, written once a session; tests that spoil one work on a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import tiny_pipelines as tiny


def folder_of(build: Callable[[], Any]) -> Any:
    """A fixture: the path of a folder with this pipeline."""

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
        return tiny.save(build(), tmp_path_factory.mktemp("pipeline"))

    return folder


sd3_folder = folder_of(tiny.sd3_pipeline)
sd3_without_t5_folder = folder_of(lambda: tiny.sd3_pipeline(with_t5=False))
sd3_m_folder = folder_of(lambda: tiny.sd3_pipeline(dual=(), qk_norm=None))
sd35_l_folder = folder_of(lambda: tiny.sd3_pipeline(dual=()))
flux_folder = folder_of(tiny.flux_pipeline)
schnell_folder = folder_of(lambda: tiny.flux_pipeline(guidance_embeds=False))
flux2_folder = folder_of(tiny.flux2_pipeline)
flux2_distilled_folder = folder_of(lambda: tiny.flux2_pipeline(distilled=True))
qwen_image_folder = folder_of(tiny.qwen_image_pipeline)
z_image_folder = folder_of(tiny.z_image_pipeline)
