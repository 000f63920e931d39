"""golden/preprocess: both paths against hpsv2, transformers' CLIPImageProcessor and image-reward, on photographs."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from golden_folder import GOLDEN, golden
from leapalign.images import to_tensor
from leapalign.rewards.preprocess import Preprocess, centre_crop, resize, shortest_edge

SIZE = 224
PATHS = {
    "clip": Preprocess(size=SIZE),
    "imagereward": Preprocess(size=SIZE, rounding="half-even"),
    "hpsv2": Preprocess(size=SIZE, fit="pad"),
}


@cache
def cases() -> list[dict]:
    return json.loads((golden("preprocess") / "cases.json").read_text())["images"]


@cache
def data() -> dict[str, torch.Tensor]:
    return load_file(golden("preprocess") / "data.safetensors")


def picture(index: int) -> Image.Image:
    return Image.open(golden("preprocess") / cases()[index]["png"])


def key(index: int, path: str, kind: str) -> str:
    if path != "imagereward":
        return f"{index}.{path}.{kind}"
    return cases()[index]["imagereward_tensor_key" if kind == "tensor" else "imagereward_pil_key"]


def expected(index: int, path: str, kind: str) -> torch.Tensor:
    return data()[key(index, path, kind)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", range(6))
def test_tensor_path(index: int, path: str) -> None:
    image = to_tensor(picture(index).convert("RGB"))[None]
    assert torch.allclose(PATHS[path](image)[0], expected(index, path, "tensor"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", range(6))
def test_pillow_path(index: int, path: str) -> None:
    levels = (255 * PATHS[path].resized(picture(index))).round().int()
    assert (levels - expected(index, path, "pil_u8").int()).abs().max() <= 1  # 0 with the same Pillow


def test_every_stored_case_is_compared() -> None:
    compared = {key(i, path, kind) for i in range(len(cases())) for path in PATHS for kind in ("tensor", "pil_u8")}
    assert compared == set(data()) and len(cases()) == 6


def test_the_tolerance_tells_antialiasing_and_crop_apart() -> None:
    """Controls: the known mistakes are far outside 1e-5."""
    image = to_tensor(picture(1).convert("RGB"))[None]  # 225 x 449: an odd remainder
    aliased = torch.nn.functional.interpolate(image, shortest_edge(image.shape[-2:], SIZE), mode="bicubic")
    smooth = resize(image, shortest_edge(image.shape[-2:], SIZE))
    crops = [centre_crop(smooth, SIZE, rounding) for rounding in ("floor", "half-even")]
    assert (centre_crop(aliased, SIZE, "floor") - crops[0]).abs().max() > 1e-3
    assert (crops[0] - crops[1]).abs().max() > 1e-2


if not GOLDEN.is_dir():
    pytestmark = pytest.mark.skip(reason=f"no expected outputs at {GOLDEN}")
