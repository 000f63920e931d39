"""The numbers that ship make models of the published sizes."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

from hub_cache import lay_out
from leapalign.errors import UserError
from leapalign.models import FAMILIES
from leapalign.planning.components import numbers_in
from leapalign.planning.meta_models import build_component
from leapalign.planning.sources import locate, write_configs
from leapalign.storage.pipeline_folder import INDEX, open_folder

PUBLISHED = {name: model for family in FAMILIES for name, model in family.published.items()}
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
    with locate(model, PUBLISHED) as source:
        assert source.shipped and source.facts is PUBLISHED[model]
        module = build_component(open_folder(str(source.folder), PUBLISHED[model].kind, ()), part)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert numbers_in(module) == (pytest.approx(published, rel=2e-3) if isinstance(published, float) else published)


def test_trained_weights_alone():
    """Exactly: other numbers of an architecture would give another count."""
    expected = {FLUX: 11_901_408_320, MEDIUM: 2_243_171_520, LARGE: 8_056_627_520}
    for model, count in expected.items():
        with locate(model, PUBLISHED) as source:
            module = build_component(open_folder(str(source.folder), PUBLISHED[model].kind, ()), "transformer")
        assert sum(p.numel() for p in module.parameters()) == count


def test_every_published_pipeline_is_of_its_own_family():
    for family in FAMILIES:
        assert family.published and {model.kind for model in family.published.values()} == {family.pipeline}


def test_a_configuration_in_the_hubs_cache_goes_before_the_numbers_that_ship(tmp_path, monkeypatch):
    """As far as it is whole: an index alone says nothing of the sizes."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    write_configs(PUBLISHED[FLUX], (tmp_path / "fetched"))
    whole = lay_out(tmp_path / "fetched", tmp_path / "cache", FLUX)
    (tmp_path / "index").mkdir()
    shutil.copy(tmp_path / "fetched" / INDEX, tmp_path / "index")
    lay_out(tmp_path / "index", tmp_path / "cache", MEDIUM)
    with locate(FLUX, PUBLISHED) as source:
        assert (source.folder, source.hub_id, source.shipped) == (whole, FLUX, False)
        assert source.facts is PUBLISHED[FLUX]
    with locate(MEDIUM, PUBLISHED) as source:
        assert source.shipped
    with pytest.raises(UserError, match="its configurations are not in the hub's cache"), locate(MEDIUM, {}):
        pass
