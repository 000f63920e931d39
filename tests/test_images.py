"""Image files as they come: read as a viewer shows them, or refused with their name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leapalign.errors import UserError
from leapalign.images import check_image, read_image, to_levels, to_pil, to_tensor

ROW, COLUMN = np.mgrid[0:48, 0:64]
RAMP = (ROW * 2 + COLUMN * 2).astype(np.uint8)  # [48, 64]
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)  # [48, 64, 3]


def levels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("8.png", RAMP),
        ("16.png", RAMP.astype(np.uint16) * 257),
        ("16.tif", RAMP.astype(np.uint16) * 257),
        ("16.pgm", RAMP.astype(np.uint16) * 257),
        ("float.tif", (RAMP / 255).astype(np.float32)),
    ],
)
def test_one_ramp_in_every_depth_is_one_image(tmp_path, name, array):
    Image.fromarray(array).save(tmp_path / name)
    assert np.array_equal(levels(tmp_path / name), np.stack([RAMP] * 3, -1))


def test_twelve_bits_of_a_tiff_are_scaled_by_twelve_bits(tmp_path, monkeypatch):
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "12.tif")
    opened = Image.open

    def as_twelve(*args):  # Pillow reads 12-bit TIFF and writes none
        image = opened(*args)
        image.tag_v2[258] = (12,)
        return image

    monkeypatch.setattr(Image, "open", as_twelve)
    assert levels(tmp_path / "12.tif").min() == 255


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGBA", "a.png"), ("P", "a.png"), ("CMYK", "a.tif"), ("RGB", "a.bmp"), ("RGB", "a.webp")],
)
def test_colours_palettes_alpha_and_print(tmp_path, mode, name):
    image = Image.fromarray(COLOURS)
    if mode == "P":
        image = image.quantize(256, dither=Image.Dither.NONE)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(RAMP))  # transparency is dropped, as the published packages do
    else:
        image = image.convert(mode)
    image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert np.abs(levels(tmp_path / name).astype(int) - np.asarray(image.convert("RGB")).astype(int)).max() == 0
    if mode != "P":
        assert np.abs(levels(tmp_path / name).astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize(("mode", "bits"), [("1", 1), ("L", 2), ("L", 4)])
def test_few_bits(tmp_path, mode, bits):
    Image.fromarray(((RAMP > 90) * 255).astype(np.uint8)).convert(mode).save(tmp_path / "a.png", bits=bits)
    assert np.array_equal(levels(tmp_path / "a.png")[..., 0], (RAMP > 90) * 255)


@pytest.mark.parametrize("depth", [8, 16])
def test_an_orientation_is_applied(tmp_path, depth):
    """EXIF 6: the camera was turned; the first row of the file is the right side of the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    array = RAMP if depth == 8 else RAMP.astype(np.uint16) * 257
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(levels(tmp_path / "a.png")[..., 0], np.rot90(RAMP, -1))


def wrong(folder: Path) -> dict[str, str]:
    """File -> what is said of it."""
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((4, 4), 200, np.float32)).save(folder / "float255.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "nan.tif")
    Image.fromarray(np.full((4, 4), 9, np.int32)).save(folder / "32.tif")
    (folder / "text.png").write_text("no image")
    return {
        "moving.gif": r"2 images \(an animation or a document\); save one",
        "moving.png": r"2 images \(an animation or a document\); save one",
        "float255.tif": r"grey values in \[200, 200\]; expected \[0, 1\]",
        "nan.tif": r"grey values in \[nan, nan\]; expected \[0, 1\]",
        "32.tif": "TIFF with 32-bit or inverted grey values",
        "text.png": "cannot be read as an image",
        "none.png": "file not found",
    }


def test_anything_else_is_refused_with_its_name(tmp_path):
    for name, message in wrong(tmp_path).items():
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            read_image(tmp_path / name)


def test_the_header_alone_shows_most_of_it(tmp_path):
    wrong(tmp_path)
    for name in ("moving.gif", "text.png", "none.png"):
        with pytest.raises(UserError, match=name):
            check_image(tmp_path / name)
    check_image(tmp_path / "32.tif")


def test_tensors_come_back():
    image = torch.rand(3, 5, 7)
    back = to_tensor(to_pil(image))
    assert back.dtype == torch.float32 and (back - image).abs().max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(to_levels(back), np.asarray(to_pil(image)))
    assert to_levels(torch.tensor([-1.0, 2.0, 0.5])[:, None, None]).ravel().tolist() == [0, 255, 128]
