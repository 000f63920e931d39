"""The page holds everything it shows, fetches nothing, and escapes what it is given; pictures are enlarged exactly."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from leapalign.evaluation.evaluate import score
from leapalign.evaluation.statistics import compare
from leapalign.geneval.rules import Detection
from leapalign.prompts import Prompt
from leapalign.report.figures import Curve, curve_svg, running_mean
from leapalign.report.heat_maps import HeatMap, heat_map_svg, heat_maps
from leapalign.report.page import Page, monitors, pairs_of, render, spread
from leapalign.report.pictures import data_uri, draw_verdicts, enlarged, grid

EVIL = '<script>alert("1")</script>'


def prompt(text: str, tag: str) -> Prompt:
    return Prompt(text, {"tag": tag, "include": [{"class": "ring", "count": 1}], "prompt": text})


PROMPTS = [prompt(f"a ring {i // 2}", "single_object") for i in range(8)] + [prompt(EVIL, "colors")] * 2


def result(found: int):
    """The first `found` pictures hold a ring."""
    images = torch.rand(len(PROMPTS), 3, 8, 8, generator=torch.Generator().manual_seed(found))
    ring = [Detection("ring", "red", (1.0, 1.0, 5.0, 6.0), 0.97)]
    return score(
        images,
        PROMPTS,
        rewards={"reward": lambda x, _: x.mean((1, 2, 3)), "held_out_reward": lambda x, _: x.amax((1, 2, 3))},
        detector=lambda x: [ring if i < found else [] for i in range(len(x))],
    )


@pytest.fixture(scope="module")
def html() -> str:
    before, after = result(3), result(7)
    metrics = [{"step": 0, "evaluation_reward": 0.25}]
    metrics += [{"step": s, "reward": s / 10, "loss": 1 - s / 10, "grad_norm": 0.5} for s in range(1, 9)]
    return render(
        Page(
            title=f"A run {EVIL}",
            run={"steps": 8, "batch_size": 4, "seed": 11, "name": EVIL},
            metrics=[*metrics, {"step": 9, "evaluation_reward": 0.5}],
            comparison=compare(before, after),
            rewards={"reward": "Reward", "held_out_reward": "Held out"},
            pairs=pairs_of(before, after, 3),
            commands=["leapalign demo --seed 11"],
            facts={"Machine": "two cores & a half"},
        )
    )


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]


def test_the_page_fetches_nothing(html: str) -> None:
    parsed = Links()
    parsed.feed(html)
    assert parsed.links and all(link.startswith(("data:", "#")) for link in parsed.links)
    assert "script" not in parsed.tags and "iframe" not in parsed.tags
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_page_shows_the_numbers(html: str) -> None:
    text = re.sub(r"<[^>]+>", "", html)
    for words in (
        "37.5 ± 17.1",
        "87.5 ± 11.7",
        "seed 11",
        "10 images",
        "leapalign demo --seed 11",
        "two cores &amp; a",
    ):
        assert words in text
    assert html.count("<svg viewBox") == 4  # evaluation reward, batch reward, loss, gradient norm
    assert html.count("<img ") == 2 * (3 + 1)  # three distinct prompts of one task, the only one of the other


def monitored() -> list[dict]:
    names = {"held_out/judge": 0.6, "diversity/pixels": 0.2, "open_color_entropy": 2.5, "image/brightness": 0.8}
    names |= {"drift": 0.1, "drift/0.500": 0.1, "evaluation_fraction_above_threshold": 0.0}
    return [{"step": s, "evaluation_reward": s / 90} | {n: v - s / 900 for n, v in names.items()} for s in (0, 20, 40)]


def test_every_monitor_has_a_curve_with_a_caption_and_the_exported_step() -> None:
    found = monitors(monitored(), 20)
    titles = [curve.title for curve in found]
    assert titles == [
        "Training reward",
        "Held-out reward judge",
        "Distance within a prompt, pixels",
        "Entropy of open colours",
        "Brightness",
        "Drift",
        "Above the threshold",
    ]
    assert all(curve.caption and curve.marked == 20 and list(curve.steps) == [0, 20, 40] for curve in found)
    assert found[1].values == (0.6, 0.6 - 20 / 900, 0.6 - 40 / 900)
    marked, plain = curve_svg(found[0]), curve_svg(replace(found[0], marked=None))
    assert "stroke-dasharray" in marked and "stroke-dasharray" not in plain
    assert monitors([{"step": 0, "evaluation_reward": 1.0, "evaluation_fraction_above_threshold": 0.0}], None) == []


def test_the_page_tells_which_step_is_exported_and_why_the_run_ended(html: str) -> None:
    before, after = result(3), result(7)
    before.diversity["pixels"], after.diversity["pixels"] = torch.tensor([0.4, 0.4]), torch.tensor([0.1, 0.1])
    page = render(
        Page(
            title="A run",
            run={"steps": 8, "batch_size": 4, "seed": 11},
            metrics=monitored(),
            comparison=compare(before, after),
            rewards={},
            pairs={},
            commands=[],
            facts={},
            exported={"step": 20, "why": "the highest held_out/judge (0.578) of 3 evaluations"},
            stopped="stopped after step 40: drift is 0.2, above 0.15",
        )
    )
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert "marks step 20, whose weights are exported: the highest held_out/judge" in text
    assert "40 updates of" in text and "with the weights of step 20; evaluated on" in text
    assert "The run stopped after step 40: drift is 0.2" in text
    assert "Distance within a prompt, pixels0.4000.1000.25" in text.replace(" 0", "0")
    assert "Entropy of open colours, bits0.0000.000" in text.replace(" 0", "0") and "Monitors" not in html


def test_the_page_escapes_what_it_is_given(html: str) -> None:
    assert EVIL not in html and "&lt;script&gt;" in html


def test_verdicts_stand_under_their_pictures(html: str) -> None:
    """Shown are images 0, 2, 4 and 8; before the first three were right, after the first seven."""
    assert html.count("✓") == 2 + 3 and html.count("✗ missing") == 2 + 1


def test_pairs_show_distinct_prompts_from_the_same_place() -> None:
    before, after = result(3), result(7)
    pairs = pairs_of(before, after, 3)["single_object"]
    assert [p.prompt for p in pairs] == ["a ring 0", "a ring 1", "a ring 2"]
    assert [p.before for p in pairs] == [data_uri(before.images[i]) for i in (0, 2, 4)]
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread([3, 4], 5) == [3, 4]


def test_curves_take_their_colors_from_the_page() -> None:
    svg = curve_svg(Curve(title='a "b"', steps=[0, 1, 2], values=[1.0, 3.0, 2.0], smooth=True))
    assert "var(--accent)" in svg and "#010101" not in svg and "#030303" not in svg
    assert svg.startswith("<svg viewBox") and "width=" not in svg[: svg.index(">")]
    assert "<text" in svg and "http://www.w3.org/1999/xlink" not in svg[: svg.index(">")]
    assert running_mean([0, 3, 6, 9], 3) == [1.5, 3, 6, 7.5]


def table(**columns: list[float]) -> dict:
    measured = ("weight", "d_j", "d_0", "grad_single/k", "grad_nested/k", "grad_single/j")
    return {"by_steps": dict.fromkeys(measured, [0.0] * len(columns["k"])) | columns}


def test_heat_maps_have_the_mean_of_all_samples_of_a_pair() -> None:
    metrics = [
        {"step": 0, "evaluation_reward": 0.1},
        table(k=[3, 4], j=[1, 2], samples=[3, 1], d_j=[0.2, 0.5]),
        table(k=[3], j=[1], samples=[1], d_j=[0.6]),
    ]
    maps = {found.title: found.values for found in heat_maps(metrics)}
    assert len(maps) == 7 and maps["Samples"] == {(3, 1): 4, (4, 2): 1}
    assert maps["Distance at j"] == {(3, 1): pytest.approx(0.3), (4, 2): 0.5}
    assert heat_maps([{"step": 0}, {"by_steps": {"k": [1], "samples": [4]}}]) == []  # one leap: no pairs


def test_a_heat_map_shows_its_largest_value_in_full_colour_k_to_the_right_and_j_upwards() -> None:
    svg = heat_map_svg(HeatMap(title="d", caption="", values={(3, 1): 0.2, (4, 2): 0.8}))
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)".*?fill-opacity="([\d.]+)".*?<title>(.*?)</title>', svg)
    (x, y, paint, words), (other_x, other_y, full, _) = cells
    assert float(other_x) > float(x) and float(other_y) < float(y) and (paint, full) == ("0.250", "1.000")
    assert words == "k = 3, j = 1: 0.2" and 'aria-label="d by k and j, at most 0.8"' in svg


def test_the_page_shows_heat_maps_only_where_there_are_pairs(html: str) -> None:
    evaluated = compare(result(3), result(7))
    metrics = [{"step": 1} | table(k=[2], j=[1], samples=[4])]
    same = {"comparison": evaluated, "rewards": {}, "pairs": {}, "commands": [], "facts": {}}
    page = render(Page(title="A run", run={"steps": 1, "batch_size": 4, "seed": 1}, metrics=metrics, **same))
    assert page.count("by k and j, at most") == 7 and "Pairs of steps" not in html


def test_pictures_are_enlarged_pixel_by_pixel() -> None:
    image = torch.rand(3, 4, 5)
    big = np.asarray(enlarged(image, 3))
    assert big.shape == (12, 15, 3)
    assert np.array_equal(big[1::3, 1::3], (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert np.array_equal(big[::3, ::3], big[2::3, 2::3])
    small = Image.open(io.BytesIO(base64.b64decode(data_uri(image).split(",")[1])))
    assert np.array_equal(np.asarray(small), big[::3, ::3])


def test_a_grid_keeps_the_order() -> None:
    images = torch.stack([torch.full((3, 4, 4), i / 10) for i in range(5)])
    sheet = np.asarray(grid(images, columns=3, scale=2, gap=1))
    assert sheet.shape == (2 * 9 + 1, 3 * 9 + 1, 3)
    assert [int(sheet[1 + r * 9, 1 + c * 9, 0]) for r, c in ((0, 0), (0, 2), (1, 1))] == [0, 51, 102]


def test_verdicts_are_drawn_on_the_pictures() -> None:
    evaluation = result(3)
    with_ring = np.asarray(draw_verdicts(evaluation, [0], columns=1, scale=5))
    box_left, box_top = 4 + 5, 4 + 28 + 5
    assert (with_ring[box_top, box_left : box_left + 20] == (40, 40, 44)).all()
    assert draw_verdicts(evaluation, [0, 5, 9], columns=2).size[1] == 2 * with_ring.shape[0]
