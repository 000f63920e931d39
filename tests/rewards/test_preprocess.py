"""Preprocessing against second derivations: the geometry by hand, the resize by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leapalign.rewards.preprocess import (
    Preprocess,
    centre_crop,
    centre_pad,
    crop_offset,
    longest_edge,
    normalise,
    resize,
    shortest_edge,
)

EDGES = st.integers(1, 3000)


@given(EDGES, EDGES, st.integers(1, 600))
def test_shortest_edge(height: int, width: int, target: int) -> None:
    edges = shortest_edge((height, width), target)
    assert min(edges) == target and edges == shortest_edge((width, height), target)[::-1]
    exact = target * max(height, width) / min(height, width)
    assert math.floor(exact + 1e-9) == max(edges) or math.floor(exact - 1e-9) == max(edges)


@given(EDGES, EDGES, st.integers(1, 600))
def test_longest_edge(height: int, width: int, target: int) -> None:
    edges = longest_edge((height, width), target)
    exact = [target * edge / max(height, width) for edge in (height, width)]
    assert max(edges) == target and min(edges) >= 1
    assert all(abs(a - b) <= 0.5 + 1e-9 or a == 1 for a, b in zip(edges, exact))


def test_edges_by_hand() -> None:
    assert shortest_edge((225, 449), 224) == (224, 447)  # 447.004
    assert shortest_edge((100, 199), 10) == (10, 19)  # 19.9 is cut, not rounded
    assert longest_edge((225, 449), 224) == (112, 224)  # 112.25
    assert longest_edge((3, 4), 6) == (4, 6)  # 4.5 goes to the even neighbour
    assert longest_edge((1, 1000), 10) == (1, 10)  # no edge vanishes


@pytest.mark.parametrize(
    ("remainder", "floor", "half_even"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2), (5, 2, 2), (7, 3, 4)]
)
def test_crop_offsets(remainder: int, floor: int, half_even: int) -> None:
    assert crop_offset(50 + remainder, 50, "floor") == floor
    assert crop_offset(50 + remainder, 50, "half-even") == half_even


def test_crop_and_pad_by_hand() -> None:
    image = torch.arange(3 * 5.0).view(1, 1, 3, 5)
    assert centre_crop(image, 2, "floor").flatten().tolist() == [1, 2, 6, 7]
    assert centre_crop(image, 2, "half-even").flatten().tolist() == [2, 3, 7, 8]  # 1.5 to 2, and 0.5 to 0
    padded = centre_pad(image[..., :2, :3] + 1, 4)[0, 0]
    assert padded.tolist() == [[0, 0, 0, 0], [1, 2, 3, 0], [6, 7, 8, 0], [0, 0, 0, 0]]


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, which antialiasing resizers use."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(length: int, target: int) -> Tensor:
    """[target, length]: the kernel, stretched when shrinking, at pixel centres; rows sum to one."""
    scale = length / target
    stretch = max(scale, 1.0)
    rows = [[cubic((i + 0.5 - (o + 0.5) * scale) / stretch) for i in range(length)] for o in range(target)]
    matrix = torch.tensor(rows, dtype=torch.float64)
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("shape", "target"), [((40, 30), (16, 12)), ((9, 11), (20, 24)), ((33, 20), (24, 24))])
def test_resize_is_the_stretched_cubic_kernel(shape: tuple[int, int], target: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *shape, dtype=torch.float64)
    rows, columns = resize_matrix(shape[0], target[0]), resize_matrix(shape[1], target[1])
    torch.testing.assert_close(resize(image, target), rows @ image @ columns.T, rtol=1e-10, atol=1e-10)


def test_resize_keeps_overshoot() -> None:
    step = torch.zeros(1, 3, 40, 40)
    step[..., 20:] = 1
    assert resize(step, (13, 13)).max() > 1.001


def test_normalise() -> None:
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    result = normalise(image, (0.1, 0.2, 0.3), (0.5, 2.0, 4.0))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 2.0), (0.3, 4.0)]):
        torch.testing.assert_close(result[:, channel], (image[:, channel] - mean) / std)


@pytest.mark.parametrize(("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_computes_in_float32_or_better(given: torch.dtype, computed: torch.dtype) -> None:
    image = torch.rand(1, 3, 30, 30).to(given).requires_grad_()
    pixels = Preprocess(size=16)(image)
    assert pixels.dtype == computed
    pixels.sum().backward()
    assert image.grad is not None and image.grad.dtype == given


def test_larger_resize_than_crop() -> None:
    """shortest edge 256, crop 224, as some processors have it: the centre of the larger picture."""
    image = torch.rand(1, 3, 60, 40)
    whole = normalise(resize(image, (48, 32)), Preprocess(size=24).mean, Preprocess(size=24).std)
    assert torch.equal(Preprocess(size=24, resize=32)(image), whole[..., 12:36, 4:28])


def test_pad_fills_with_black_before_normalising() -> None:
    pixels = Preprocess(size=24, fit="pad", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))(torch.ones(1, 3, 20, 40))
    assert pixels[0, 0, :, 12].tolist() == pytest.approx([-2.0] * 6 + [2.0] * 12 + [-2.0] * 6)
