"""The swap test and the exchange of weights by step: both ends are the plain models' images, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny_pipelines as tiny
from leapalign.cli import main
from leapalign.codec import dumps
from leapalign.errors import UserError
from leapalign.evaluation.exchange import Exchanged, exchange_by_step
from leapalign.evaluation.image_folder import ImageFiles
from leapalign.evaluation.sampling import Sampling, draw_files
from leapalign.evaluation.swap import last_with_half, share, swap_test
from leapalign.lookup.pairs import pairs_of
from leapalign.lookup.sources import find_tuned
from leapalign.models.sd3 import SD3
from leapalign.prompts import Prompt, PromptFile
from leapalign.recipes import shapeworld_leapalign
from leapalign.run import Run
from leapalign.shapeworld.captions import TASKS, contrast, evaluation_prompts, near_misses
from leapalign.tuning.adapter import lora_layers
from leapalign.tuning.full import FULL
from leapalign.tuning.lora import LoRA

SAMPLING = Sampling(num_steps=3, images_per_prompt=2, batch_size=3)
TEXTS = ["a red circle", "a blue square"]
PROMPTS = [Prompt(text) for text in TEXTS]
CPU = ("--device", "cpu")


def mean_red(images: Tensor, texts: Sequence[str]) -> Tensor:
    """A reward that reads its prompt: red images for prompts with "red", others without it."""
    signs = torch.tensor([1.0 if "red" in text else -1.0 for text in texts])
    return signs * images[:, 0].mean((1, 2))


def plain(model: Any, prompts: Sequence[Prompt], folder: Path) -> list[Tensor]:
    return pixels(ImageFiles(tuple(draw_files(model, prompts, SAMPLING, folder))))


def pixels(images: ImageFiles) -> list[Tensor]:
    return [images[i] for i in range(len(images))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_swap_at_the_first_step_is_the_second_prompt_and_none_is_the_first(model_config: SD3, tmp_path: Path) -> None:
    model, (a, b) = model_config.load("cpu", "float32"), (PROMPTS, PROMPTS[::-1])
    found = swap_test(
        model, list(zip(a, b)), sampling=SAMPLING, rewards={"red": mean_red}, detector=None, at=[1], on_batch=None
    )
    assert found.steps == (3, 1, 0)
    assert same(pixels(found.images[0]), plain(model, b, tmp_path / "b"))
    assert same(pixels(found.images[-1]), plain(model, a, tmp_path / "a"))
    assert not same(pixels(found.images[1]), pixels(found.images[-1]))
    shares = [row["rewards"]["red"]["share"] for row in found.numbers["steps"]]
    assert shares in ([1.0, pytest.approx(shares[1]), 0.0], [None] * 3)
    with pytest.raises(UserError, match="step 4: expected 0 to 3"):
        swap_test(model, list(zip(a, b)), sampling=SAMPLING, rewards={}, detector=None, at=[4])


def test_the_share_of_an_effect_is_a_ratio_of_means_with_its_error() -> None:
    start, end = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 2.0])
    assert share(end, start, end) == {"share": 1.0, "standard_error": 0.0}
    assert share(start, start, end) == {"share": 0.0, "standard_error": 0.0}
    values = torch.tensor([1.0, 1.0, 1.0, 1.0])  # ratio 1/2, residuals 0.5, 0, -0.5, 0
    error = (0.5 / 3) ** 0.5 / 2 / 2
    assert share(values, start, end) == {"share": 0.5, "standard_error": pytest.approx(error)}
    assert share(values, start, -end)["share"] is None  # the second prompt has no effect to take a share of
    missing = torch.tensor([1.0, 1.0, 1.0, float("nan")])
    assert share(missing, start, end)["share"] == 0.5


def test_half_of_an_effect_counts_from_what_the_first_prompt_alone_has() -> None:
    assert last_with_half((8, 6, 4, 0), (0.5, 0.4, 0.36, 0.3)) == 6
    assert last_with_half((8, 6, 4, 0), (0.5, 0.4, 0.4, 0.3)) == 4
    assert last_with_half((8, 4, 0), (0.3, 0.4, 0.3)) is None  # no effect
    assert last_with_half((8, 4, 0), (0.5, None, 0.3)) is None


def test_pairs_differ_in_the_claim_of_their_task() -> None:
    for caption in evaluation_prompts(6):
        others = [contrast(caption, i) for i in range(6)]
        assert all(other["tag"] == caption["tag"] and other in near_misses(caption) for other in others)
        classes = sorted(claim["class"] for claim in caption["include"])
        kept = caption["tag"] not in ("single_object", "two_object")
        assert all((sorted(c["class"] for c in o["include"]) == classes) == kept for o in others), caption
    pairs = pairs_of((), "", 2)
    assert [second.text for _, second in pairs] == [p["prompt"] for p in evaluation_prompts(2)] and len(TASKS) == 6


def test_other_prompts_are_paired_with_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*TEXTS, "a star"]))
    found = [(first.text, second.text) for first, second in pairs_of((), str(file), 1)]
    assert found == [(TEXTS[1], TEXTS[0]), ("a star", TEXTS[1]), (TEXTS[0], "a star")]
    file.write_text("alone")
    with pytest.raises(UserError, match="'alone' is the only prompt"):
        pairs_of((), str(file), 1)


@pytest.fixture
def base(tmp_path: Path) -> SD3:
    folder = tiny.save(tiny.sd3_pipeline(), tmp_path / "base")
    return SD3(path=folder, height=32, width=32, guidance_scale=2.0, max_sequence_length=5, decode_chunk=0)


@pytest.fixture
def full(base: SD3, tmp_path: Path) -> Run:
    """A finished run whose tuned weights are scaled ones."""
    run = replace(shapeworld_leapalign(), model=base, out=str(tmp_path / "run"), num_sampling_steps=3)
    model = base.load("cpu", "float32")
    with torch.no_grad():
        for p in model.policy.parameters():
            p.mul_(1.05)
    FULL.save(model, Path(run.out, "pipeline"))
    Path(run.out, "run.json").write_text(dumps(run))
    return run


@pytest.fixture
def lora(base: SD3, tmp_path: Path) -> Run:
    """A finished run whose adapter is a random one."""
    tuning = LoRA(rank=2)
    run = replace(shapeworld_leapalign(), model=base, tuning=tuning, out=str(tmp_path / "run"), num_sampling_steps=3)
    model = base.load("cpu", "float32", tuning)
    with torch.no_grad():
        for layer in lora_layers(model.policy).values():
            layer.lora_B["default"].weight.normal_(std=0.2)
    Path(run.out, "lora").mkdir(parents=True)
    tuning.save(model, Path(run.out, "lora"))
    Path(run.out, "run.json").write_text(dumps(run))
    return run


def exchanged(run: Run, *ranges: tuple[int, int]) -> Exchanged:
    ends = find_tuned(run.out, {}).load_with_base("cpu", "float32")
    settings: dict[str, Any] = {"sampling": SAMPLING, "rewards": {"red": mean_red}, "detector": None}
    return exchange_by_step(ends, PROMPTS, ranges=ranges, **settings)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_all_steps_are_the_tuned_model_and_none_is_the_base(kind: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(kind)
    found, place = exchanged(run, (1, 3), (2, 3)), Path(run.out).parent
    assert found.names == ("base", "tuned", "2-3", "1-1")
    tuned = plain(find_tuned(run.out, {}).load("cpu", "float32"), PROMPTS, place / "a")
    untuned = plain(run.model.load("cpu", "float32"), PROMPTS, place / "b")
    assert same(pixels(found.images[1]), tuned) and same(pixels(found.images[0]), untuned)
    assert not same(tuned, untuned)
    for images in found.images[2:]:
        assert not same(pixels(images), tuned) and not same(pixels(images), untuned)
    everywhere, early = found.numbers["ranges"]
    assert everywhere["only_there"] == found.numbers["tuned"] and early["steps"] == "2-3"
    assert everywhere["everywhere_else"]["rewards"]["red"]["difference"] == 0


def test_by_default_every_split_is_tried(full: Run) -> None:
    assert exchanged(full).names == ("base", "tuned", "1-2", "1-1", "3-3", "2-3")


def test_another_base_is_refused_for_weights_tuned_in_place(full: Run) -> None:
    from leapalign.checkpoint.inputs import inputs_of

    inputs = {"folder": ".", "inputs": inputs_of(full, []), "derived": {}}
    Path(full.out, "inputs.json").write_text(json.dumps(inputs))
    find_tuned(full.out, {})
    file = Path(full.model.path, "transformer", "diffusion_pytorch_model.safetensors")
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"the base is not the one.*is compared with it"):
        find_tuned(full.out, {})


def test_the_commands_print_json_and_a_table_and_write_a_folder(full: Run, tmp_path: Path, capsys) -> None:
    flags = ("--per-task", "1", *CPU)
    assert main(["diagnose", "exchange", full.out, "--ranges", "2-3", *flags, "--json", "--out", f"{tmp_path}/x"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["ranges"][0]["steps"] == "2-3" and numbers["images"] == 6
    assert set(numbers["tuned"]["geneval"]) == {"overall", *TASKS}
    written = json.loads((tmp_path / "x" / "numbers.json").read_text())
    assert written["columns"] == ["base", "tuned", "2-3", "1-1"] and written["tuned"] == numbers["tuned"]
    assert main(["diagnose", "swap", full.out, "--at", "2", *flags, "--out", f"{tmp_path}/y"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["3", "2", "0"]
    for place in ("x", "y"):
        for name in ("figure.png", "images.png"):
            with Image.open(tmp_path / place / name) as image:
                assert len(image.convert("RGB").getcolors(10**6) or []) > 10
    assert main(["diagnose", "swap", full.out, *CPU, "--out", f"{tmp_path}/y"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a kind"),
        (["swop"], "did you mean 'swap'?"),
        (["swap", "nowhere"], "folder not found"),
        (["swap", "embedded:generator", "--at", "9", *CPU], "--at 9: expected a step from 8"),
        (["swap", "embedded:generator", "--pair", "a", "b", "--prompts", "shapeworld", *CPU], "either --pair or"),
        (["exchange", "embedded:generator", *CPU], "expected the folder of a finished run"),
    ],
)
def test_a_mistake_is_exit_2_and_a_sentence(argv: list[str], message: str, capsys) -> None:
    assert main(["diagnose", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [("3", "two steps such as 5-8"), ("2-4", "steps 2-4: expected two of")])
def test_a_range_that_is_none_is_refused(full: Run, words: str, message: str, capsys) -> None:
    assert main(["diagnose", "exchange", full.out, "--ranges", words, *CPU]) == 2
    assert message in capsys.readouterr().err


def test_prompts_without_a_reward_are_refused(base: SD3, tmp_path: Path, capsys) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    assert main(["diagnose", "swap", base.path, "--prompts", str(file), *CPU]) == 2
    assert "give a --reward" in capsys.readouterr().err
    assert PromptFile(path=str(file)).load() == PROMPTS
