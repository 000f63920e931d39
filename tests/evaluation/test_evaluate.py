"""Pictures from paired noise, their scores and the comparison of two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from leapalign.cli import main
from leapalign.errors import RunStopped, UserError
from leapalign.evaluation import sampling as sampling_module
from leapalign.evaluation.evaluate import evaluate, score
from leapalign.evaluation.image_folder import begin_or_continue, image_paths, read_images, write_image
from leapalign.evaluation.image_statistics import DEFINITIONS, brightness
from leapalign.evaluation.sampling import Sampling, draw_images
from leapalign.evaluation.statistics import Evaluation, compare, report
from leapalign.geneval.open_colors import entropy, open_colors
from leapalign.lookup.prompts import prompts_of
from leapalign.prompts import Prompt, PromptFile, ShapeWorldPrompts
from leapalign.prompts.geneval import GenEvalPrompts
from leapalign.prompts.sets import DrawBench, HPDv2, MJHQ30k
from leapalign.report.tables import evaluation_table
from leapalign.seeds import generator
from leapalign.shapeworld.captions import TASKS, evaluation_prompts, near_misses, scene_of
from leapalign.shapeworld.detector import detect
from leapalign.shapeworld.world import render

PROMPTS = [Prompt(p["prompt"], p) for p in evaluation_prompts(4)]


def drawn(wrong_every: int, seed: int = 0) -> torch.Tensor:
    """True pictures of PROMPTS, but every n-th shows something else."""
    rng = np.random.default_rng(seed)
    told = [p.metadata if i % wrong_every else near_misses(p.metadata)[0] for i, p in enumerate(PROMPTS)]
    return torch.from_numpy(render([scene_of(m, rng) for m in told]))


def mean_red(images: torch.Tensor, texts: list[str]) -> torch.Tensor:
    assert len(images) == len(texts)
    return images[:, 0].mean((1, 2))


def judged(wrong_every: int) -> Evaluation:
    return score(drawn(wrong_every), PROMPTS, rewards={"red": mean_red}, detector=detect, batch_size=5)


def test_answers_without_a_number_are_counted_and_left_out_of_the_mean():
    class InWords:
        def may_fail(self):
            return True

        def __call__(self, images, texts):
            return torch.tensor([float("nan") if "cross" in text else 3.0 for text in texts])

    images, failures = drawn(99), sum("cross" in p.text for p in PROMPTS)
    found = report(score(images, PROMPTS, rewards={"words": InWords()}, detector=None))["rewards"]["words"]
    assert found == {"mean": 3.0, "standard_error": 0.0, "num": len(PROMPTS), "failures": failures} and failures > 2
    crosses = [p for p in PROMPTS if "cross" in p.text]
    with pytest.raises(UserError, match="no readable number"):
        score(images[: len(crosses)], crosses, rewards={"words": InWords()}, detector=None)


def test_any_other_reward_that_is_nan_stops_with_the_prompt():
    def broken(images, texts):
        return torch.tensor([float("nan") if i == 3 else 1.0 for i in range(len(texts))])

    with pytest.raises(RunStopped, match=f"the reward mine: nan for the prompt '{PROMPTS[3].text}'"):
        score(drawn(99), PROMPTS, rewards={"mine": broken}, detector=None)


def test_pictures_do_not_depend_on_the_batch(model_config) -> None:
    model, texts = model_config.load("cpu", "float32"), ["a red circle", "a circle", "a square"]
    one = draw_images(model, texts, Sampling(num_steps=3, images_per_prompt=2, batch_size=1))
    all_at_once = draw_images(model, texts, Sampling(num_steps=3, images_per_prompt=2, batch_size=6))
    assert one.shape == (6, 3, 32, 32)
    torch.testing.assert_close(one, all_at_once, atol=1e-5, rtol=0)
    alone = draw_images(model, texts[:1], Sampling(num_steps=3))
    torch.testing.assert_close(alone, one[:1], atol=1e-5, rtol=0)


def test_noise_is_of_the_seed_the_prompt_and_the_picture(model_config) -> None:
    model, seen = model_config.load("cpu", "float32"), []
    noise = model.noise
    model.noise = lambda generators: seen.append(noise(generators)) or seen[-1]
    draw_images(model, ["a circle"] * 2, Sampling(num_steps=1, images_per_prompt=2, seed=3))
    expected = [(i, n) for i in range(2) for n in range(2)]
    generators = [generator(3, step=i, sample=n, purpose="evaluation noise") for i, n in expected]
    assert torch.equal(seen[0], noise(generators))
    assert len({row.sum().item() for row in seen[0]}) == 4


def test_evaluate_scores_what_it_draws(model_config, reward_config) -> None:
    model, reward = model_config.load("cpu", "float32"), reward_config.load("cpu", "float32")
    done: list[int] = []
    result = evaluate(
        model,
        PROMPTS[:3],
        sampling=Sampling(num_steps=2, images_per_prompt=2, batch_size=4),
        rewards={"pick": reward},
        detector=detect,
        on_batch=done.append,
    )
    assert done == [4, 6]
    assert [p.text for p in result.prompts] == [p.text for p in PROMPTS[:3] for _ in range(2)]
    assert result.rewards["pick"][4].item() == pytest.approx(
        reward(result.images[4][None], [PROMPTS[2].text]).item(), abs=1e-5
    )
    assert len(result.verdicts) == 6 and len(result.images) == 6


def test_report_of_true_pictures_is_perfect() -> None:
    table = report(judged(wrong_every=10**9))["geneval"]
    assert set(table) == {"overall", *TASKS}
    for tag in TASKS[1:]:
        assert table[tag] == {"accuracy": 1.0, "standard_error": 0.0, "correct": 4, "num": 4}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("geneval", GenEvalPrompts(split="test")),
        ("hpdv2", HPDv2(split="test")),
        ("hpdv2=a=b.json", HPDv2(split="test", path="a=b.json")),
        ("mjhq-30k", MJHQ30k(split="test")),
        ("drawbench=x.json", DrawBench(path="x.json")),
        ("shapeworld", ShapeWorldPrompts(split="test", num=7)),
        ("some/file.txt", PromptFile(path="some/file.txt")),
        ("geneval.jsonl", PromptFile(path="geneval.jsonl")),
    ],
)
def test_prompts_are_a_file_or_the_test_prompts_of_a_set(word, expected) -> None:
    assert prompts_of(word, per_task=7) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("genevall", r"unknown prompt set 'genevall'; did you mean 'geneval'\?; give one of .*drawbench.*, or a .txt"),
        ("hpdv3=test.json", "unknown prompt set 'hpdv3'; did you mean 'hpdv2'"),
        ("file", "unknown prompt set 'file'"),
        ("geneval=x.jsonl", "geneval takes no path"),
        ("hpdv2=", "a path is missing"),
        ("a\0b", "unknown prompt set"),
    ],
)
def test_a_prompt_set_that_is_none(word, message) -> None:
    with pytest.raises(UserError, match=message):
        prompts_of(word, per_task=7)


def test_the_command_takes_a_set(tmp_path, capsys) -> None:
    (tmp_path / "drawbench.json").write_text(json.dumps(["a red circle", "two blue stars"]))
    words = ["evaluate", "embedded:generator", "--steps", "1", "--device", "cpu", "--json"]
    assert main([*words, "--prompts", f"drawbench={tmp_path}/drawbench.json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["images"] == 2 and "geneval" not in answer and answer["rewards"]["pickscore"]["num"] == 2
    assert main([*words, "--prompts", "drawbensh"]) == 2
    assert "did you mean 'drawbench'" in capsys.readouterr().err
    assert main([*words, "--prompts", "shapeworld", "--per-task", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["geneval"]["overall"]["num"] == 6


def test_compare_is_paired() -> None:
    before, after = judged(wrong_every=2), judged(wrong_every=4)
    table = compare(before, after)
    row = table["geneval"]["position"]
    assert (row["before"], row["after"], row["difference"]) == (0.5, 0.75, 0.25)
    # one of four pictures turned right: mean 1/4, sample variance 1/4, so error sqrt(1/4/4)
    assert row["difference_standard_error"] == pytest.approx(0.25)
    changes = (after.rewards["red"] - before.rewards["red"]).numpy()
    assert table["rewards"]["red"]["difference"] == pytest.approx(changes.mean())
    assert table["rewards"]["red"]["difference_standard_error"] == pytest.approx(
        changes.std(ddof=1) / len(changes) ** 0.5
    )
    assert json.loads(json.dumps(table)) == table


def test_monitors_of_an_evaluation_and_of_a_comparison() -> None:
    before, after = judged(wrong_every=10**9), judged(wrong_every=2)
    after.diversity["pixels"], before.diversity["pixels"] = torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.2])
    one, table = report(before), compare(before, after)
    counts = open_colors([p.metadata for p in PROMPTS], before.detections)
    assert one["open_colors"] == {"entropy": entropy(counts), "counts": dict(counts)}
    row = table["open_colors"]["entropy"]
    assert row["before"] == entropy(counts) and row["ratio"] == row["after"] / row["before"] != 1
    assert sum(color["before"] for color in table["open_colors"]["counts"].values()) == sum(counts.values())
    row = table["diversity"]["pixels"]
    assert (row["before"], row["after"], row["ratio"], row["num"]) == pytest.approx((0.3, 0.15, 0.5, 2))
    assert set(table["image_statistics"]) == set(DEFINITIONS)
    row, images = table["image_statistics"]["brightness"], drawn(2)
    assert row["after"] == pytest.approx(float(brightness(images).mean()), abs=1e-6)
    changes = (brightness(images) - brightness(drawn(10**9))).double()
    assert row["difference_standard_error"] == pytest.approx(float(changes.std() / len(changes) ** 0.5), rel=1e-4)
    for answer in (one, table):
        assert json.loads(json.dumps(answer)) == answer
        printed = evaluation_table(answer)
        assert "entropy of open colors" in printed and "dark_share" in printed
    assert "ratio 0.50" in evaluation_table(table)


def test_compare_refuses_other_prompts() -> None:
    whole = judged(wrong_every=2)
    part = score(drawn(2)[:4], PROMPTS[:4], rewards={}, detector=detect)
    with pytest.raises(ValueError, match="same prompts"):
        compare(part, whole)


def test_rewards_alone_need_no_metadata() -> None:
    plain = [Prompt(p.text) for p in PROMPTS]
    result = report(score(drawn(2), plain, rewards={"red": mean_red}, detector=None))
    assert "geneval" not in result and result["rewards"]["red"]["num"] == len(plain)
    with pytest.raises(UserError, match="metadata"):
        score(drawn(2), plain, rewards={}, detector=detect)


def write(folder: Path, images: torch.Tensor, prompts: list[Prompt]) -> list[Path]:
    """Two images a prompt."""
    paths = image_paths(folder, len(prompts), 2)
    for i, (path, image) in enumerate(zip(paths, images)):
        write_image(path, image, prompts[i // 2])
    return paths


def test_geneval_folders_come_back(tmp_path) -> None:
    images = drawn(3)[:6]
    paths = write(tmp_path, images, PROMPTS[:3])
    assert str(paths[3].relative_to(tmp_path)) == "00001/samples/0001.png"
    back = list(read_images(tmp_path))
    assert [p.metadata for p, _ in back] == [p.metadata for p in PROMPTS[:3] for _ in range(2)]
    torch.testing.assert_close(torch.stack([image for _, image in back]), images, atol=0.5 / 255 + 1e-6, rtol=0)


def test_an_image_that_is_not_finite_is_no_file(tmp_path) -> None:
    with pytest.raises(RunStopped, match=f"the image for the prompt '{PROMPTS[0].text}'"):
        write_image(tmp_path / "0" / "samples" / "0.png", torch.full((3, 4, 4), torch.nan), PROMPTS[0])
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_mixes_no_settings(tmp_path) -> None:
    settings, paths = {"seed": 0, "model": {"height": 32}}, image_paths(tmp_path, 1, 2)
    assert begin_or_continue(tmp_path, settings, paths, overwrite=False) == 0
    write(tmp_path, drawn(3)[:2], PROMPTS[:1])
    assert begin_or_continue(tmp_path, settings, paths, overwrite=False) == 2
    with pytest.raises(UserError, match=r"other settings \(model.height: 32 -> 64\); give another folder"):
        begin_or_continue(tmp_path, {"seed": 0, "model": {"height": 64}}, paths, overwrite=False)
    assert begin_or_continue(tmp_path, {"seed": 1}, paths, overwrite=True) == 0 and not list(tmp_path.rglob("*.png"))
    (tmp_path / "images.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        begin_or_continue(tmp_path, settings, paths, overwrite=False)


def test_images_of_somebody_else_are_not_overwritten(tmp_path) -> None:
    paths = write(tmp_path, drawn(3)[:2], PROMPTS[:1])
    old = paths[0].read_bytes()
    with pytest.raises(UserError, match=r"exists \(2 files would be replaced\)"):
        begin_or_continue(tmp_path, {}, paths, overwrite=False)
    assert paths[0].read_bytes() == old


def test_a_continued_folder_equals_one_in_one_go(model_config, reward_config, tmp_path) -> None:
    """After a kill some images are there, one of them cut by a crash of the machine; whole batches are kept."""
    settings = dict(sampling=Sampling(num_steps=2, images_per_prompt=2, batch_size=2), detector=detect)
    rewards = {"pick": reward_config.load("cpu", "float32")}
    whole = evaluate(
        model_config.load("cpu", "float32"), PROMPTS[:3], rewards=rewards, folder=tmp_path / "a", **settings
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    paths = image_paths(tmp_path / "b", 3, 2)
    paths[2].unlink()
    paths[5].write_bytes(b"")
    model, drawn_again = model_config.load("cpu", "float32"), []
    noise = model.noise
    model.noise = lambda generators: drawn_again.append(len(generators)) or noise(generators)
    again = evaluate(model, PROMPTS[:3], rewards=rewards, folder=tmp_path / "b", **settings)
    assert drawn_again == [2, 2]
    assert torch.equal(again.rewards["pick"], whole.rewards["pick"]) and again.verdicts == whole.verdicts
    for one, two in zip(image_paths(tmp_path / "a", 3, 2), paths):
        assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_images_of_an_evaluation_without_a_folder_go_with_it(model_config) -> None:
    result = evaluate(
        model_config.load("cpu", "float32"), PROMPTS[:1], sampling=Sampling(num_steps=1), rewards={}, detector=None
    )
    path = result.images.paths[0]
    assert path.is_file() and result.images[0].shape == (3, 32, 32)
    del result
    assert not path.exists()


def test_no_more_than_a_batch_is_in_memory(model_config, tmp_path, monkeypatch) -> None:
    """Every batch is written before the next is drawn, and read again for the rewards."""
    seen: list[int] = []

    def count(images, texts):
        seen.append(len(images))
        return images.mean((1, 2, 3))

    written: list[int] = []
    sampling = Sampling(num_steps=1, batch_size=4)
    evaluate(
        model_config.load("cpu", "float32"),
        PROMPTS[:10],
        sampling=sampling,
        rewards={"mean": count},
        detector=None,
        folder=tmp_path,
        on_batch=lambda done: written.append(len(list(tmp_path.rglob("*.png")))),
    )
    assert written == [4, 8, 10] and seen == [4, 4, 2]


def test_the_command_continues_after_an_interruption(tmp_path, capsys, monkeypatch) -> None:
    words = ["evaluate", "embedded:generator", "--steps", "1", "--device", "cpu", "--json", "--per-task", "1"]
    words += ["--batch-size", "2"]
    assert main(words) == 0
    expected = json.loads(capsys.readouterr().out)
    whole, calls = sampling_module.draw_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(sampling_module, "draw_batch", interrupted)
    assert main([*words, "--out", str(tmp_path / "o")]) == 130
    said = capsys.readouterr().err
    assert "o are kept, and the same command continues" in said and "resume" not in said
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    captured = capsys.readouterr()
    assert "2 of 6 images are there and are kept" in captured.err
    assert json.loads(captured.out) == expected
    assert main([*words, "--out", str(tmp_path / "o"), "--seed", "1"]) == 2
    assert "images made with other settings (seed: 0 -> 1)" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "o"), "--seed", "1", "--overwrite"]) == 0


def test_both_models_of_a_comparison_keep_their_images(tmp_path, capsys) -> None:
    words = ["evaluate", "embedded:generator", "--against", "embedded:generator", "--steps", "1", "--device", "cpu"]
    assert main([*words, "--per-task", "1", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"]["pickscore"]["difference"] == 0
    for folder in (tmp_path, tmp_path / "against"):
        assert len(list(folder.glob("*/samples/*.png"))) == 6
        assert len(list(folder.glob("diversity/*/samples/*.png"))) == 4 * 6
