"""The numbers that ship make models of the published sizes."""

from __future__ import annotations

import pytest

from leapalign.models.published import PIPELINES
from leapalign.planning.components import numbers_in
from leapalign.planning.meta_models import build_part, folder_of
from leapalign.storage.pipeline_folder import open_folder

FLUX, MEDIUM = "black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-3.5-medium"
LARGE, SD3M = "stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.mark.parametrize(
    ("model", "part", "published"),
    [
        (FLUX, "transformer", 11.90e9),
        (FLUX, "text_encoder_2", 4.76e9),
        (FLUX, "text_encoder", 123e6),
        (FLUX, "vae", 83.8e6),
        (MEDIUM, "transformer", 2.47e9),  # the table of 384 x 384 positions included
        (MEDIUM, "text_encoder_2", 695e6),
        (LARGE, "transformer", 8.15e9),  # 8.06e9 without the table
        (SD3M, "transformer", 2.085e9),
        # unchecked: what their names say, to the digits that these have
        ("black-forest-labs/FLUX.2-klein-4B", "transformer", pytest.approx(4e9, rel=0.05)),
        ("black-forest-labs/FLUX.2-klein-base-9B", "transformer", pytest.approx(9e9, rel=0.05)),
        ("black-forest-labs/FLUX.2-klein-4B", "text_encoder", pytest.approx(4e9, rel=0.02)),  # Qwen3-4B
        ("black-forest-labs/FLUX.2-klein-9B", "text_encoder", 8.19e9),  # Qwen3-8B
        ("Qwen/Qwen-Image", "transformer", pytest.approx(20e9, rel=0.03)),
        ("Qwen/Qwen-Image", "text_encoder", 8.29e9),  # Qwen2.5-VL-7B
        ("Tongyi-MAI/Z-Image", "transformer", pytest.approx(6e9, rel=0.05)),
    ],
)
def test_published_sizes(model, part, published):
    with folder_of(model) as (folder, known):
        assert known is PIPELINES[model]
        module = build_part(open_folder(str(folder), known.kind, ()), part)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert numbers_in(module) == (pytest.approx(published, rel=2e-3) if isinstance(published, float) else published)


def test_trained_weights_alone():
    """Exactly: other numbers of an architecture would give another count."""
    expected = {FLUX: 11_901_408_320, MEDIUM: 2_243_171_520, LARGE: 8_056_627_520}
    for model, count in expected.items():
        with folder_of(model) as (folder, _):
            module = build_part(open_folder(str(folder), PIPELINES[model].kind, ()), "transformer")
        assert sum(p.numel() for p in module.parameters()) == count
