"""The numbers that ship make models of the published sizes."""

from __future__ import annotations

import pytest

from leapalign.models.folder import open_folder
from leapalign.planning.architectures import PIPELINES
from leapalign.planning.parts import numbers_in
from leapalign.planning.weightless import build_part, folder_of

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
    ],
)
def test_published_sizes(model, part, published):
    with folder_of(model) as (folder, known):
        assert known is PIPELINES[model]
        module = build_part(open_folder(str(folder), known.kind, ()), part)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert numbers_in(module) == pytest.approx(published, rel=2e-3)


def test_trained_weights_alone():
    """Exactly: other numbers of an architecture would give another count."""
    expected = {FLUX: 11_901_408_320, MEDIUM: 2_243_171_520, LARGE: 8_056_627_520}
    for model, count in expected.items():
        with folder_of(model) as (folder, _):
            module = build_part(open_folder(str(folder), PIPELINES[model].kind, ()), "transformer")
        assert sum(p.numel() for p in module.parameters()) == count
