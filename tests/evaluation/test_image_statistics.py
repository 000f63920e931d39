"""Statistics of hand-made images whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from leapalign.evaluation.image_statistics import DEFINITIONS, image_statistics


def plain(*color: float) -> torch.Tensor:
    return torch.tensor(color)[:, None, None].expand(3, 8, 8).clone()


def halves(left: tuple[float, ...], right: tuple[float, ...]) -> torch.Tensor:
    image = plain(*left)
    image[:, :, 4:] = torch.tensor(right)[:, None, None]
    return image


def values(image: torch.Tensor) -> dict[str, float]:
    found = image_statistics(image[None])
    assert all(value.shape == (1,) and value.dtype == torch.float32 for value in found.values())
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (plain(0.5, 0.5, 0.5), {"edge_density": 0, "color_entropy": 0, "saturation": 0, "brightness": 0.5}),
        (plain(0, 0, 0), {"saturation": 0, "brightness": 0, "dark_share": 1}),
        (plain(1, 1, 1), {"brightness": 1, "dark_share": 0, "color_entropy": 0}),
        (plain(1, 0, 0), {"saturation": 1, "brightness": 0.299, "dark_share": 0}),
        (plain(0, 0, 1), {"saturation": 1, "brightness": 0.114, "dark_share": 1}),
        (plain(0.8, 0.4, 0.4), {"saturation": 0.5}),
        (
            halves((0, 0, 0), (1, 1, 1)),
            {"edge_density": 1 / 7, "color_entropy": 1, "brightness": 0.5, "dark_share": 0.5},
        ),
        (halves((0.5, 0.5, 0.5), (0.59, 0.59, 0.59)), {"edge_density": 0}),  # softer than an edge
    ],
)
def test_known_values(image, expected) -> None:
    found = values(image)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_edges_run_both_ways() -> None:
    across = halves((0, 0, 0), (1, 1, 1))
    assert values(across)["edge_density"] == values(across.mT)["edge_density"] == pytest.approx(1 / 7)


def test_colours_at_the_ends_of_their_ranges() -> None:
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = image_statistics(noise)
    assert set(found) == set(DEFINITIONS)
    assert (found["color_entropy"] > 8.8).all() and (found["color_entropy"] <= 9).all()
    thirds = torch.zeros(3, 3, 8, 9)
    thirds[:, 0, :, 3:6], thirds[:, 1, :, 6:] = 1, 1
    assert float(image_statistics(thirds)["color_entropy"][0]) == pytest.approx(math.log2(3), abs=1e-5)


def test_each_image_has_its_own_values() -> None:
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole, alone = image_statistics(images), [image_statistics(image[None]) for image in images]
    for name in DEFINITIONS:
        torch.testing.assert_close(whole[name], torch.cat([one[name] for one in alone]))
